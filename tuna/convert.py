"""Other people's shapes of ranked data, as the fields of a `tuna.records.Record`.

A converter takes one row (a dict) and returns a dict with `prompt` or `messages`, `responses`, and `scores`
or `ranks`; checking the values is the record's business. Which end is better is never guessed, it is part of
the shape:

| shape | fields | best |
|---|---|---|
| `tuna` | `prompt` or `messages`, `responses[]`, `scores[]` or `ranks[]` | highest score, lowest rank |
| `released` | `instruction`, `output[]`, `score[]`, `id` | highest |
| `alpaca_eval` | as `released`, with `generator[]` | highest |
| `preference` | `prompt`, `chosen`, `rejected` | chosen |
| `ranked_answers` | `prompt` or `question`, `answers[]` or `responses[]` of `{answer, rank}` | lowest |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["FORMATS", "Format", "convert_row", "detect_format", "known_formats"]

Row: TypeAlias = Mapping[str, Any]
Fields: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One shape of input.

    Attributes:
        name: what `format=` takes.
        keys: its fields, in words, for error messages and help.
        matches: whether a row has this shape, by its keys.
        convert: the row as fields of a `Record`; raises `ValueError` in plain words.
    """

    name: str
    keys: str
    matches: Callable[[Row], bool]
    convert: Callable[[Row], Fields]


def convert_row(row: Any, format: str) -> Fields:
    """One row of the shape `format` as fields of a `Record`.

    Raises:
        ValueError: unknown format, the row is no object, a field is missing or of the wrong kind.

    Example:
        >>> convert_row({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "preference")
        {'prompt': '2+2?', 'responses': ['4', '5'], 'ranks': [0, 1]}
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r} is unknown; the shapes known are\n{known_formats()}")
    if not isinstance(row, Mapping):
        raise ValueError(f"a record must be an object with named fields, not {_kind(row)}")
    # Parquet and datasets give every row every column: an absent field is there as None.
    present = {key: value for key, value in row.items() if value is not None}
    fields = FORMATS[format].convert(present)
    if "id" in present and "id" not in fields:
        fields["id"] = present["id"]
    return fields


def detect_format(row: Any) -> str | None:
    """The name of the first shape whose keys the row has, or None."""
    if not isinstance(row, Mapping):
        return None
    present = {key: value for key, value in row.items() if value is not None}
    return next((name for name, format in FORMATS.items() if format.matches(present)), None)


def known_formats() -> str:
    """One line a shape: its name and its fields."""
    return "\n".join(f"  {format.name}: {format.keys}" for format in FORMATS.values())


def _from_tuna(row: Row) -> Fields:
    fields = {key: row[key] for key in ("messages", "responses", "scores", "ranks") if key in row}
    return {**_prompt_fields(row, "prompt"), **fields}


def _from_scored_outputs(row: Row) -> Fields:
    """`instruction, output[], score[]`; a single `output` text without a score is for plain fine-tuning."""
    fields = _prompt_fields(row, "instruction")
    context = row.get("input")
    if context:
        # Alpaca keeps the text to work on apart; left out, the answer would not fit the question.
        fields["prompt"] = f"{fields['prompt']}\n{context}"
    output, score = _required(row, "output"), row.get("score")
    if isinstance(output, str):
        return {**fields, "responses": [output]}
    return {**fields, "responses": output, **({} if score is None else {"scores": score})}


def _from_preference(row: Row) -> Fields:
    chosen_context, chosen = _last_turn(_required(row, "chosen"), "chosen")
    rejected_context, rejected = _last_turn(_required(row, "rejected"), "rejected")
    if chosen_context != rejected_context:
        raise ValueError("'chosen' and 'rejected' answer different conversations: all turns but the last must agree")
    prompt = row.get("prompt", row.get("question", row.get("instruction")))
    fields: Fields
    if not chosen_context:
        if prompt is None:
            raise ValueError("field 'prompt' is missing, and 'chosen' holds no earlier turns to take it from")
        fields = _prompt_value(prompt)
    elif isinstance(prompt, str) and chosen_context == [{"role": "user", "content": prompt}]:
        fields = {"prompt": prompt}
    else:
        fields = {"messages": chosen_context}
    return {**fields, "responses": [chosen, rejected], "ranks": [0, 1]}


def _from_ranked_answers(row: Row) -> Fields:
    fields = _prompt_fields(row, "prompt", "question", "instruction")
    key = "answers" if "answers" in row else "responses"
    answers = _required(row, key)
    if not isinstance(answers, list):
        raise ValueError(f"field {key!r} must be a list of {{answer, rank}}, not {_kind(answers)}")
    texts, ranks = [], []
    for i, answer in enumerate(answers):
        if not isinstance(answer, Mapping):
            raise ValueError(f"{key}[{i}] must be an object {{answer, rank}}, not {_kind(answer)}")
        text = next((answer[k] for k in ("answer", "response", "text") if answer.get(k) is not None), None)
        if text is None:
            raise ValueError(f"{key}[{i}] has no field 'answer'")
        if answer.get("rank") is None:
            raise ValueError(f"{key}[{i}] has no field 'rank'")
        texts.append(text)
        ranks.append(answer["rank"])
    return {**fields, "responses": texts, "ranks": ranks}


def _prompt_fields(row: Row, *keys: str) -> Fields:
    """The prompt under the first of `keys` that the row has; a list of turns becomes `messages`."""
    found = next((key for key in keys if key in row), None)
    if found is None:
        if "messages" in row:
            return {"messages": row["messages"]}
        raise ValueError("field " + " or ".join(map(repr, keys)) + " is missing")
    return _prompt_value(row[found])


def _prompt_value(prompt: Any) -> Fields:
    return {"messages": prompt} if isinstance(prompt, list) else {"prompt": prompt}


def _last_turn(answer: Any, name: str) -> tuple[list[Fields], Any]:
    """An answer given as text, or as a conversation that ends with it: (the turns before, the text)."""
    if not isinstance(answer, list):
        return [], answer
    turns = [dict(turn) if isinstance(turn, Mapping) else {} for turn in answer]
    if not turns or turns[-1].get("role") != "assistant":
        raise ValueError(f"the last turn of {name!r} must be the assistant's")
    context = [{"role": turn.get("role"), "content": turn.get("content")} for turn in turns[:-1]]
    return context, turns[-1].get("content")


def _required(row: Row, key: str) -> Any:
    if key not in row:
        raise ValueError(f"field {key!r} is missing")
    return row[key]


def _kind(value: Any) -> str:
    names = {
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "nothing (null)",
        bool: "true or false",
    }
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _has_prompt(row: Row) -> bool:
    return any(key in row for key in ("prompt", "question", "instruction", "messages"))


# In the order of detection: the first that matches is taken, so the more particular shape stands first.
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "ranked_answers",
            "prompt or question, answers[] or responses[] of {answer, rank} (rank 0 or 1 is best)",
            lambda row: (
                _has_prompt(row) and (_holds_objects(row.get("answers")) or _holds_objects(row.get("responses")))
            ),
            _from_ranked_answers,
        ),
        Format(
            "tuna",
            "prompt or messages, responses[], scores[] (higher is better) or ranks[] (0 or 1 is best)",
            lambda row: ("prompt" in row or "messages" in row) and "responses" in row,
            _from_tuna,
        ),
        Format(
            "preference",
            "prompt, chosen, rejected",
            lambda row: "chosen" in row and "rejected" in row,
            _from_preference,
        ),
        Format(
            "alpaca_eval",
            "instruction, output[], score[], generator[] (score: higher is better)",
            lambda row: "instruction" in row and "output" in row and "generator" in row,
            _from_scored_outputs,
        ),
        Format(
            "released",
            "instruction, output[], score[], id (score: higher is better)",
            lambda row: "instruction" in row and "output" in row,
            _from_scored_outputs,
        ),
    )
}
