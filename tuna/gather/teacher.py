"""Responses of a teacher behind an OpenAI-compatible endpoint, with their log-probabilities."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tuna.data.instructions import Instruction
from tuna.data.records import Record
from tuna.data.templates import render_prompt
from tuna.gather.api.answers import MISSING, parse_choices, stored_choices
from tuna.gather.api.calls import PaidCalls, Request, request_key
from tuna.gather.api.endpoint import Api, CallFailed, EndpointRefused
from tuna.gather.responses import Response, ResponseSet

__all__ = ["NoLogprobs", "Sampling", "generate_responses", "parse_choices", "probe_logprobs", "with_extra"]


PROBED = 4  # tokens of the probe
_MANY = re.compile(
    r"['\"`]n['\"`]|\bn ?(?:[>=]|must|should|is|greater)|"
    r"\b(?:multiple|several|single|only one)\b.{0,20}\b(?:choice|completion)",
    re.IGNORECASE,
)  # in errors of endpoints that give only one choice per request


class NoLogprobs(ValueError):
    """The endpoint returns no log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Request parameters of a teacher, for each instruction.

    Where one request is not enough, `seed` is sent plus the number of the draw. `extra` has further fields of the
    request, such as `{"top_k": 40}`; they win, and None takes a field away.

    Raises:
        ValueError: a value outside its range.
    """

    model: str = field(metadata={"help": "Name of the model at the endpoint."})
    api: Api = field(default="chat", metadata={"help": "Whether prompts are sent as messages (chat) or as text."})
    n: int = field(default=4, metadata={"help": "Responses per prompt."})
    max_tokens: int = field(default=512, metadata={"help": "Maximum length of a response, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass of nucleus sampling."})
    seed: int | None = field(default=None, metadata={"help": "Sampling seed sent to the endpoint."})
    stop: tuple[str, ...] = field(default=(), metadata={"help": "Text that ends a response; may be repeated."})
    template: str = field(
        default="none", metadata={"help": "Prompt template for completions: none, alpaca or a text with {prompt}."}
    )
    system: str | None = field(default=None, metadata={"help": "System message for chat."})
    logprobs: bool = field(default=True, metadata={"help": "Require the log-probabilities of the tokens."})
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.api not in ("completions", "chat"):
            raise ValueError(f"api = {self.api!r} is neither 'completions' nor 'chat'")
        for name in ("n", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature = {self.temperature} must be between 0 and 2")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1")
        if self.api == "chat" and self.template != "none":
            raise ValueError(f"template = {self.template!r} is for api = 'completions'; a chat endpoint has its own")
        if self.api == "completions" and self.system is not None:
            raise ValueError("system is for api = 'chat'; put the text into the template")

    def parameters(self) -> dict[str, Any]:
        """All fields as JSON values, for a manifest."""
        return {**asdict(self), "stop": list(self.stop), "extra": dict(self.extra)}

    def request(self, instruction: Instruction, n: int | None = None, draw: int = 0) -> Request:
        """The request for `n` (default: all) responses; `draw` is its index among the instruction's requests.

        Raises:
            ValueError: the instruction cannot be rendered with the template.
        """
        body: dict[str, Any] = {
            "model": self.model,
            **self._prompt(instruction),
            "n": n or self.n,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        if self.seed is not None:
            body["seed"] = self.seed + draw
        if self.stop:
            body["stop"] = list(self.stop)
        return Request(self.api, with_extra({**body, **self._wanted()}, self.extra), draw)

    def probe(self, max_tokens: int = PROBED) -> Request:
        """The cheapest request that shows whether the endpoint returns log-probabilities."""
        prompt = self._prompt(Instruction(id="probe", prompt="Say: yes"))
        body = {"model": self.model, **prompt, "max_tokens": max_tokens, **self._wanted()}
        return Request(self.api, with_extra(body, self.extra))

    def _wanted(self) -> dict[str, Any]:
        if not self.logprobs:
            return {}
        return {"logprobs": True if self.api == "chat" else 1}

    def _prompt(self, instruction: Instruction) -> dict[str, Any]:
        if self.api == "chat":
            before = [] if self.system is None else [{"role": "system", "content": self.system}]
            return {"messages": [*before, *instruction.turns()]}
        if instruction.messages is not None:
            raise ValueError(f"instruction {instruction.id!r} has messages; they need api = 'chat'")
        record = Record(id=instruction.id, prompt=instruction.prompt, responses=[""])
        return {"prompt": render_prompt(record, self.template, None)}


def with_extra(body: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """A request with further fields; a field that is None is removed.

    Raises:
        ValueError: an invalid number of choices or tokens, or a stream is requested.
    """
    found = {name: value for name, value in {**body, **extra}.items() if value is not None}
    for name in ("n", "max_tokens", "max_completion_tokens"):
        value = found.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"--extra: {name} = {value!r} must be a whole number, at least 1")
    if found.get("stream"):
        raise ValueError("--extra: stream is not supported")
    return found


async def generate_responses(
    calls: PaidCalls, sampling: Sampling, instruction: Instruction, *, keep_logprobs: bool = False
) -> ResponseSet:
    """`sampling.n` responses to an instruction; if the endpoint returns fewer, the rest is requested again.

    If it refuses more than one choice per request, one at a time is requested from then on.

    Raises:
        CallFailed: a call was given up. Earlier answers are in the journal.
        BudgetSpent: a call exceeds the budget.
    """
    found: list[Response] = []
    draw = 0
    while len(found) < sampling.n:
        answer = await _draw(calls, sampling, instruction, sampling.n - len(found), draw)
        found += [_response(choice, keep_logprobs) for choice in answer["choices"]]
        draw += 1
    return ResponseSet(
        **instruction.model_dump(),
        responses=found[: sampling.n],
        model=answer["model"] or sampling.model,
        sampling={name: value for name, value in sampling.parameters().items() if name != "model" and value},
    )


async def _draw(calls: PaidCalls, sampling: Sampling, instruction: Instruction, n: int, draw: int) -> dict[str, Any]:
    """An answer of up to `n` choices."""

    async def ask(choices: int) -> dict[str, Any]:
        request = sampling.request(instruction, choices, draw)
        parse = parse_choices(sampling.api, logprobs=sampling.logprobs)
        stored = stored_choices(logprobs=sampling.logprobs)
        answer: dict[str, Any] = await calls.ask(request.api, request.body, parse, stored=stored, draw=draw)
        return answer

    def known(choices: int) -> bool:
        request = sampling.request(instruction, choices, draw)
        return request_key(request.api, request.body, draw=draw) in calls.journal

    # An earlier run may have found this out: its answers are not paid for again.
    if not known(n) and (calls.endpoint.single_choice or known(1)):
        n = 1
    try:
        return await ask(n)
    except EndpointRefused:
        raise
    except CallFailed as error:
        if n == 1 or "n" in sampling.extra or not _refuses_many(error):
            raise
        refused = error
    try:
        answer = await ask(1)
    except EndpointRefused:
        raise
    except CallFailed:
        raise refused from None  # the number of choices was not the reason
    calls.endpoint.single_choice = True
    return answer


def _refuses_many(error: CallFailed) -> bool:
    """Whether the endpoint may have refused the number of choices."""
    if error.status in (400, 413, 422, 501):
        return True
    return error.status is not None and _MANY.search(str(error)) is not None


async def probe_logprobs(calls: PaidCalls, sampling: Sampling) -> None:
    """Send one short request to check for log-probabilities. It counts as a call, once per folder.

    A reasoning model may need as many tokens as its responses before it returns any text.

    Raises:
        NoLogprobs: there are none.
        CallFailed: the endpoint does not answer.
    """
    advice = (
        "only this probe was sent. Score the responses with a local model (--score-with MODEL), "
        "or gather them without log-probabilities (--no-logprobs)"
    )
    choices: list[dict[str, Any]] = []
    for most in (PROBED, sampling.max_tokens):
        request = sampling.probe(most)
        parse = parse_choices(request.api, logprobs=False, probe=True)
        try:
            stored = stored_choices(logprobs=False)
            answer = await calls.ask(request.api, request.body, parse, stored=stored, probe=True)
        except EndpointRefused:
            raise
        except CallFailed as error:
            if error.status not in (400, 422):
                raise
            raise NoLogprobs(f"the endpoint refuses log-probabilities ({error}); {advice}") from error
        choices = answer["choices"]
        if any(choice["text"].strip() for choice in choices):
            break
    if all(choice["logprobs"] is None for choice in choices):
        why = next((choice["missing"] for choice in choices if "missing" in choice), "has none")
        if not why.endswith(MISSING):
            raise NoLogprobs(f"{sampling.model} answers without log-probabilities (its answer {why}); {advice}")


def _response(choice: Mapping[str, Any], keep_logprobs: bool) -> Response:
    values = choice["logprobs"]
    total = None if values is None else math.fsum(values)
    return Response(
        text=choice["text"],
        tokens=choice["tokens"],
        logprob_sum=total,
        logprob_mean=total / len(values) if total is not None and values else None,
        finish_reason=choice["finish_reason"],
        logprobs=values if keep_logprobs else None,
        reasoning=choice.get("reasoning"),
    )
