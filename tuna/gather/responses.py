"""Response sets: the responses to an instruction, as written by `tuna generate` and `tuna sample`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tuna.data.files import write_rows
from tuna.data.instructions import Instruction, present_fields, read_items
from tuna.data.problems import OnBad, Problem
from tuna.data.prompts import check_answer, prompt_of
from tuna.data.records import Text
from tuna.gather.api.answers import LEAST, ROUNDING

__all__ = [
    "ENDS",
    "Response",
    "ResponseSet",
    "read_responses",
    "write_responses",
]

Logprob: TypeAlias = Annotated[float, Field(le=ROUNDING, gt=LEAST, allow_inf_nan=False)]
# Finish reasons, as named by endpoints, of responses that ended by themselves.
ENDS = frozenset({
    "", "stop", "stopped", "eos", "eos_token", "end_turn", "end_of_turn", "stop_sequence", "stop_token", "complete",
    "completed", "finished", "finish_reason_stop",
})  # fmt: skip


class Response(BaseModel):
    """One sampled response.

    Attributes:
        text: the response without the prompt.
        tokens: number of tokens (of log-probabilities if given, else as reported by the endpoint), or None.
        logprob_sum: sum of the tokens' natural log-probabilities given the prompt, or None.
        logprob_mean: the sum divided by `tokens`, or None.
        finish_reason: "stop" (it ended), "length" (it was cut) or another reason given by the endpoint.
        logprobs: log-probability of each token, if kept.
        reasoning: the model's reasoning before the answer, if any; in no other field, and not trained on.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    text: Text
    tokens: int | None = Field(default=None, ge=0)
    logprob_sum: float | None = Field(default=None, le=ROUNDING, allow_inf_nan=False)
    logprob_mean: float | None = Field(default=None, le=ROUNDING, gt=LEAST, allow_inf_nan=False)
    finish_reason: str | None = None
    logprobs: list[Logprob] | None = None
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Response:
        if self.logprob_sum is not None and self.tokens and self.logprob_sum <= LEAST * self.tokens:
            raise ValueError(f"logprob_sum = {self.logprob_sum} over {self.tokens} tokens includes missing values")
        return self

    @property
    def cut(self) -> bool:
        """Whether it did not end by itself: at the limit, by a filter, in a tool call."""
        return self.finish_reason is not None and self.finish_reason.lower() not in ENDS


class ResponseSet(Instruction):
    """An instruction and its sampled responses, in the order of sampling.

    Attributes:
        responses: at least one.
        model: the model that responded.
        sampling: sampling parameters (temperature, top_p, max_tokens, …).
        scored_by: the local model of the log-probabilities; None: they are the endpoint's.
    """

    responses: list[Response] = Field(min_length=1)
    model: str | None = None
    sampling: dict[str, Any] | None = None
    scored_by: str | None = None


def read_responses(
    source: str | os.PathLike[str] | Iterable[Any], *, on_bad: OnBad = "fail"
) -> tuple[list[ResponseSet], list[Problem]]:
    """Read a file of `write_responses`; `responses` may also be plain texts. Errors as in `read_instructions`."""
    return read_items(source, ResponseSet, _response_fields, on_bad)


def write_responses(path: str | os.PathLike[str], sets: Iterable[ResponseSet]) -> None:
    """Write response sets as JSONL or a JSON array, by suffix; atomic."""
    write_rows(path, (item.model_dump(exclude_none=True) for item in sets))


def _response_fields(row: Any) -> dict[str, Any]:
    present = present_fields(row)
    responses = present.get("responses")
    if isinstance(responses, list):
        for number, item in enumerate(responses):
            if isinstance(item, Mapping):
                check_answer(item, f"responses[{number}]", reasoning=True)
        responses = [{"text": item} if isinstance(item, str) else item for item in responses]
    given = present.get("id")
    named = {} if given is None else {"id": str(given) if isinstance(given, int) else given}
    asked = prompt_of(present)
    others = {key: value for key, value in present.items() if key not in ("prompt", "messages")}
    fields = {**others, **asked, **named, "responses": responses}
    return fields if given is not None else {key: value for key, value in fields.items() if key != "id"}
