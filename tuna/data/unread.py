"""Unread fields of a row that hold responses, scores, turns or a prompt.

A file with five responses and five scores in unknown fields, and the best and the worst of them as `chosen` and
`rejected`, is read as pairs: three responses would be dropped silently. Metadata is ignored: a field is judged by its
name together with the type of its value, and a text that the record already has is not lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tuna.data.prompts import USED, is_empty

__all__ = ["check_all_read"]

ANSWERS = frozenset({
    "answer", "answers", "response", "responses", "completion", "completions", "output", "outputs", "generation",
    "generations", "generated", "candidate", "candidates", "sample", "samples", "choice", "choices", "reply",
    "replies", "chosen", "rejected", "reference", "references", "solution", "solutions", "demonstration",
    "demonstrations", "prediction", "predictions",
})  # fmt: skip
SCORES = frozenset({
    "score", "scores", "rank", "ranks", "ranking", "rankings", "rating", "ratings", "reward", "rewards", "grade",
    "grades", "preference", "preferences", "logprob", "logprobs", "vote", "votes", "judgement", "judgements",
    "judgment", "judgments",
})  # fmt: skip
PROMPTS = frozenset({
    "prompt", "prompts", "question", "questions", "instruction", "instructions", "query", "conversation",
    "conversations", "dialogue", "dialog", "turns", "system",
})  # fmt: skip
NOTES = frozenset({
    "id", "ids", "idx", "index", "model", "models", "source", "sources", "name", "names", "type", "types", "length",
    "lengths", "len", "token", "tokens", "count", "counts", "hash", "url", "date", "time", "lang", "language",
    "category", "version", "rating", "score", "rank", "label", "labels", "format", "author", "status", "dir", "path",
})  # fmt: skip
"""Last words of the names of fields that describe a text rather than hold it: `chosen_model`, `prompt_id`."""
TEXT_KEYS = ("content", "value", "text", "answer", "response", "completion", "output", "generation", "message")
SENTENCE = 5  # words from which on the texts of a list are more than tags


def check_all_read(row: Mapping[str, Any], reads: frozenset[str], fields: Mapping[str, Any], format: str) -> None:
    """Reject a row with such fields.

    Args:
        row: without the fields that are None.
        reads: fields that the format reads, except the prompt's.
        fields: the converted row.
        format: the name of the format.

    Raises:
        ValueError: names the fields and the remedy.
    """
    held = {text for key in ("prompt", "messages", "responses") for text in _texts(fields.get(key))}
    unread = [
        f"{str(key)!r} ({kind})"
        for key, value in row.items()
        if key not in reads and key not in USED and key != "id" and (kind := _kind(str(key), value)) is not None
        if not (texts := list(_texts(value))) or not held.issuperset(texts)
    ]
    if unread:
        many = len(unread) > 1
        raise ValueError(
            f"field{'s' * many} {', '.join(unread)} {'are' if many else 'is'} not read by format {format!r} and "
            "would be dropped: put all responses of a prompt into 'responses' with 'scores' or 'ranks' (format 'tuna'),"
            f" remove the field{'s' * many}, or set format = {format!r} to ignore {'them' if many else 'it'}"
        )


def _kind(name: str, value: Any) -> str | None:
    """What a field holds, in short; None for metadata."""
    if is_empty(value) or isinstance(value, bool | int | float):
        return None
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    described = bool(words) and words[-1] in NOTES
    answers = not described and not ANSWERS.isdisjoint(words)
    asked = not described and not PROMPTS.isdisjoint(words)
    if isinstance(value, str):
        return "a text" if answers or asked else None
    if isinstance(value, Mapping):
        texts = list(_texts(value))
        return "an object with text" if texts and ("role" in value or answers) else None
    if not isinstance(value, list | tuple):
        return None
    if all(isinstance(item, int | float) or item is None for item in value):
        return f"{len(value)} numbers" if len(value) > 1 and not SCORES.isdisjoint(words) else None
    texts = list(_texts(value))
    if any(isinstance(item, Mapping | list | tuple) for item in value):
        return f"{len(value)} objects with text" if texts else None
    long = len(texts) > 1 and any(len(text.split()) >= SENTENCE for text in texts)
    return f"{len(value)} texts" if texts and (answers or asked or (long and not described)) else None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value: itself, its members, the content of turns."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key in TEXT_KEYS or isinstance(part, Mapping | list | tuple):
                yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
