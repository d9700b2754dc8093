"""Validation of an endpoint's answer before it is recorded; step two after `bodies`.

Every field is checked separately. An invalid count becomes None, an invalid log-probability makes the choice unusable
or its log-probabilities None, and text that UTF-8 cannot encode is cleaned, so later code can rely on the values. Of
several choices the usable ones are kept. Answers from an existing journal are checked by the same rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tuna.gather.api.bodies import UnusableAnswer, clean_text, short
from tuna.gather.api.budget import Usage
from tuna.gather.api.reasoning import CLOSING, split_reasoning
from tuna.gather.api.remedies import error_message

__all__ = ["LEAST", "MISSING", "ROUNDING", "Api", "parse_choices", "reported_usage", "stored_choices"]

Api = Literal["completions", "chat"]
MOST_TOKENS = 10_000_000  # per call; beyond the limit of every model, so a larger count is invalid
MOST_LABEL = 200  # characters of a model's name or a finish reason
LEAST = -1000.0  # no sampled token is less likely: -9999 (OpenAI, vLLM) or -1e9 mark a missing value
MISSING = "a placeholder for a missing value"
ROUNDING = 1e-3  # rounding may put a log-probability this much above 0
# End tokens as endpoints list them: <|im_end|>, </s>, <end_of_turn>.
_SPECIAL = re.compile(rb"\s*(?:<[|/]?[\w\xef\xbd\x9c\xe2\x96\x81:-]{1,40}[|\xef\xbd\x9c]{0,3}>)?\s*", re.ASCII)


def parse_choices(api: Api, *, logprobs: bool, probe: bool = False) -> Callable[[Any], dict[str, Any]]:
    """A parser of answers to JSON values for the journal.

    It returns `{"model", "choices": [{"text", "finish_reason", "tokens", "logprobs"}]}`; a choice of a reasoning model
    also has `reasoning`, one without log-probabilities may have `missing` (the reason), and `left_out` has the reasons
    for unusable choices. It raises `UnusableAnswer` if no choice is usable.

    Args:
        api: the API, which decides the format of the answer.
        logprobs: whether a choice needs the log-probabilities of its tokens.
        probe: accept a choice without text.
    """

    def parse(reply: Any) -> dict[str, Any]:
        choices = reply.get("choices") if isinstance(reply, Mapping) else None
        if not isinstance(choices, list) or not choices:
            words = short(error_message(reply))
            raise UnusableAnswer("it has no choices" + (f", but an error: {words}" if words else ""))
        usage = reply.get("usage")
        alone = usage if len(choices) == 1 and isinstance(usage, Mapping) else {}
        return _usable(reply.get("model"), choices, lambda choice: _choice(api, choice, alone, probe), logprobs)

    return parse


def stored_choices(*, logprobs: bool) -> Callable[[Any], dict[str, Any]]:
    """A reader of journal entries made by `parse_choices`, also by earlier versions; raises `UnusableAnswer` too."""

    def read(answer: Any) -> dict[str, Any]:
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or not choices:
            raise UnusableAnswer("it has no choices")
        return _usable(answer.get("model"), choices, _stored_choice, logprobs)

    return read


def reported_usage(reply: Any) -> Usage | None:
    """Tokens of a call as reported by the endpoint, None if it does not report them."""
    usage = reply.get("usage") if isinstance(reply, Mapping) else None
    if not isinstance(usage, Mapping):
        return None
    prompt, output = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens", 0))
    return None if prompt is None or output is None else Usage(prompt, output)


def _usable(
    model: Any, choices: Sequence[Any], read: Callable[[Mapping[str, Any]], dict[str, Any]], logprobs: bool
) -> dict[str, Any]:
    def one(choice: Any) -> dict[str, Any] | UnusableAnswer:
        try:
            if not isinstance(choice, Mapping):
                raise UnusableAnswer("is not an object")
            found = read(choice)
        except UnusableAnswer as error:
            return error
        if logprobs and found["logprobs"] is None:
            return UnusableAnswer(found.get("missing") or "has no log-probabilities")
        return found

    read_ones = [one(choice) for choice in choices]
    found = [item for item in read_ones if not isinstance(item, UnusableAnswer)]
    errors = {number: item for number, item in enumerate(read_ones) if isinstance(item, UnusableAnswer)}
    problems = [f"choice {number} {error}" for number, error in errors.items()]
    if not found:
        raise UnusableAnswer("; ".join(problems[:3]), again=any(error.again for error in errors.values()))
    answer = {"model": _label(model), "choices": found}
    return {**answer, "left_out": problems[:20]} if problems else answer


def _choice(api: Api, choice: Mapping[str, Any], usage: Mapping[str, Any], probe: bool) -> dict[str, Any]:
    """A choice as recorded; `usage` is that of the answer if this is its only choice."""
    message = choice.get("message") if api == "chat" else choice
    if not isinstance(message, Mapping):
        raise UnusableAnswer("has no text")
    reason = _label(choice.get("finish_reason"))
    given, thought = _parts(message.get("content" if api == "chat" else "text"))
    refused = given is None and isinstance(message.get("refusal"), str)
    if refused:
        given = message["refusal"]  # an answer too: a retry would give the same
    for name in ("reasoning_content", "reasoning"):
        thought = thought or (message[name] if isinstance(message.get(name), str) else "")
    thinking, text = split_reasoning(clean_text(given or ""))
    thinking = clean_text(thought) or thinking
    hidden = _reasoning_tokens(usage)
    calls = bool(message.get("tool_calls") or message.get("function_call"))
    if (given is None or (not text.strip() and (thinking or hidden or calls))) and not probe:
        raise _no_text(message, reason, bool(thinking or hidden))
    if calls and reason in (None, "stop"):
        reason = "tool_calls"  # the text is not the whole answer
    values, missing = _logprobs(choice.get("logprobs"), text, bool(thinking or hidden), refused)
    tokens = None if values is None else len(values)
    if tokens is None and (total := _count(usage.get("completion_tokens"))) is not None:
        tokens = total - hidden if total >= hidden and (hidden or not thinking) else None
    kept = {"text": text, "finish_reason": reason, "tokens": tokens, "logprobs": values}
    kept |= {"reasoning": thinking} if thinking else {}
    return kept | ({"missing": missing} if missing else {})


def _stored_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    text = choice.get("text")
    if not isinstance(text, str):
        raise UnusableAnswer("has no text")
    thinking, text = split_reasoning(clean_text(text))
    missing = choice.get("missing") if isinstance(choice.get("missing"), str) else None
    values = choice.get("logprobs")
    if thinking and values is not None:  # of an earlier version: which tokens are reasoning is unknown
        values, missing = None, "has log-probabilities of its reasoning too"
    elif isinstance(values, list):
        values, missing = _checked(values, text)
    else:
        values = None
    told = choice.get("reasoning")
    thinking = clean_text(told) if isinstance(told, str) else thinking
    tokens = len(values) if values is not None else _count(choice.get("tokens"))
    kept = {"text": text, "finish_reason": _label(choice.get("finish_reason")), "tokens": tokens, "logprobs": values}
    kept |= {"reasoning": thinking} if thinking else {}
    return kept | ({"missing": missing} if missing else {})


def _parts(content: Any) -> tuple[str | None, str]:
    """The text and the reasoning of a message given as a list of parts."""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        return None, ""
    texts = {"text": "", "thinking": ""}
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        inner = part.get(kind) if kind in ("text", "thinking") else None
        if isinstance(inner, list):
            inner = "".join(str(one.get("text", "")) for one in inner if isinstance(one, Mapping))
        if not isinstance(inner, str):
            return None, ""
        texts[str(kind)] += inner
    return texts["text"], texts["thinking"]


def _no_text(message: Mapping[str, Any], reason: str | None, thinking: bool) -> UnusableAnswer:
    """Why a choice has no text, and whether a retry at the full price is worthwhile."""
    if reason == "length":
        where = "went into its reasoning" if thinking else "were used up before any"
        words = f'has no text: its max_tokens {where} (finish_reason "length"); raise --max-tokens'
        return UnusableAnswer(words, again=False)
    if reason == "content_filter":
        return UnusableAnswer(
            'has no text: the endpoint\'s filter withheld it (finish_reason "content_filter")', again=False
        )
    if message.get("tool_calls") or message.get("function_call"):
        return UnusableAnswer("has no text but calls a tool")
    return UnusableAnswer("has no text" + (f' (finish_reason "{short(reason, 40)}")' if reason else ""))


def _logprobs(given: Any, text: str, reasoned: bool, refused: bool) -> tuple[list[float] | None, str | None]:
    """The log-probability of each token of `text`, or None and the reason.

    Both formats (`content[].logprob`, `token_logprobs`) are read under either API.
    """
    if not isinstance(given, Mapping):
        return None, None
    content, values, tokens = given.get("content"), given.get("token_logprobs"), given.get("tokens")
    if refused and isinstance(given.get("refusal"), list):
        content = given["refusal"]
    if isinstance(content, list):
        if not all(isinstance(item, Mapping) for item in content):
            return None, "has log-probabilities that are not objects"
        values = [item.get("logprob") for item in content]
        pieces = _pieces([item["bytes"] if item.get("bytes") else item.get("token") for item in content])
    elif isinstance(values, list):
        if isinstance(tokens, list) and len(tokens) != len(values):
            return None, f"has {len(values)} log-probabilities for {len(tokens)} tokens"
        pieces = _pieces(tokens)
    else:
        return None, None
    start = _first_of_text(pieces, text.encode(), reasoned)
    if isinstance(start, str):
        return None, start
    return _checked(values[start:], text)


def _checked(values: Sequence[Any], text: str) -> tuple[list[float] | None, str | None]:
    """Values as log-probabilities, or None and why they are invalid."""
    if not values and text.strip():
        return None, "has a text, but no log-probability of any token"
    if len(values) > len(text.encode()) + 8:  # a token has at least one byte, except end tokens
        return None, f"has log-probabilities of {len(values)} tokens for a text of {len(text)} characters"
    found = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(number := _float(value)):
            return None, f"has {'NaN' if isinstance(value, float) else type(value).__name__} as a log-probability"
        if number > ROUNDING:
            return None, f"has {number:.6g} as a log-probability, which is above 0"
        if number <= LEAST:
            return None, f"has {number:.6g} as a log-probability, {MISSING}"
        found.append(min(number, 0.0))
    return found, None


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _first_of_text(pieces: list[bytes] | None, text: bytes, reasoned: bool) -> int | str:
    """The index of the first token of the text, or why it cannot be determined.

    Tokens before it belong to reasoning that the endpoint removed from the text, or to a repeated prompt.
    Token names that do not spell the text (such as `Ġfruit`) are accepted unless there was reasoning.
    """
    mixed = "has log-probabilities of its reasoning too, and its own cannot be told apart"
    whole = text.strip()
    if pieces is None:
        return mixed if reasoned else 0
    joined = b"".join(pieces)
    if not whole or joined.strip() == whole:
        return len(pieces) if reasoned and not whole else 0
    closed = max(joined.rfind(tag) + len(tag) if tag in joined else -1 for tag in CLOSING)
    for start in (closed, _end_of_rest(pieces, joined, whole)):
        if start < 0 or not joined[start : start + len(whole) + 64].lstrip().startswith(whole):
            continue
        at = 0
        for index, piece in enumerate(pieces):
            at += len(piece)
            if at > start and joined[start:at].strip():
                return index if not joined[at - len(piece) : start].strip() else mixed
    if len(pieces) > 1 and joined.strip() and whole.startswith(joined.strip()):
        return f"has log-probabilities of its first {len(pieces)} tokens only"
    return mixed if reasoned or closed >= 0 else 0


def _end_of_rest(pieces: Sequence[bytes], joined: bytes, whole: bytes) -> int:
    """Where the text begins in the joined tokens if they end with it, ignoring end tokens; -1 if they do not."""
    end = len(joined)
    for piece in [b"", *reversed(pieces[-4:])]:
        if not _SPECIAL.fullmatch(piece):
            break
        end -= len(piece)
        while end and joined[end - 1 : end].isspace():
            end -= 1
        if joined.endswith(whole, 0, end):
            return end - len(whole)
    return -1


def _pieces(given: Any) -> list[bytes] | None:
    """Tokens as bytes, from their texts or their lists of bytes; None if one has neither."""
    if not isinstance(given, list) or not given:
        return None
    try:
        return [clean_text(item).encode() if isinstance(item, str) else bytes(_octets(item)) for item in given]
    except (TypeError, ValueError):
        return None


def _octets(item: Any) -> list[int]:
    if not isinstance(item, list) or not all(type(value) is int for value in item):
        raise TypeError
    return item


def _count(value: Any) -> int | None:
    """A valid number of tokens, or None."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= MOST_TOKENS else None


def _reasoning_tokens(usage: Mapping[str, Any]) -> int:
    details = usage.get("completion_tokens_details")
    return (_count(details.get("reasoning_tokens")) or 0) if isinstance(details, Mapping) else 0


def _label(value: Any) -> str | None:
    """A valid name given by the endpoint, or None."""
    return clean_text(value) if isinstance(value, str) and 0 < len(value) <= MOST_LABEL else None
