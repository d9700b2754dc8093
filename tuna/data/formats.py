"""Conversion of other formats of ranked data to the fields of a `tuna.data.records.Record`.

A converter takes one row (a dict) and returns a dict with `prompt` or `messages`, `responses`, and `scores`
or `ranks`; `Record` validates the values. The direction of the order is part of the format and never guessed:

| format | fields | best |
|---|---|---|
| `tuna` | `prompt` or `messages`, `responses[]`, `scores[]` or `ranks[]` | highest score, lowest rank |
| `released` | `instruction`, `output[]`, `score[]`, `id` | highest |
| `alpaca_eval` | as `released`, with `generator[]` | highest |
| `preference` | `prompt`, `chosen`, `rejected` | chosen |
| `ranked_answers` | `prompt` or `question`, `answers[]` or `responses[]` of `{answer, rank}` | lowest |

Other fields that belong to a prompt are converted with it or rejected (`tuna.data.prompts`). If the format was detected
rather than given, an unread field that holds responses, scores, turns or a prompt is rejected (`tuna.data.unread`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuna.data.prompts import Fields, Row, check_answer, prompt_of, turns_of
from tuna.data.unread import check_all_read

__all__ = ["FORMATS", "Format", "convert_row", "detect_format", "known_formats"]


@dataclass(frozen=True)
class Format:
    """An input format.

    Attributes:
        name: the value of `format=`.
        keys: its fields, as shown in error messages and help.
        matches: whether the keys of a row are those of this format.
        convert: converts a row to fields of a `Record`; raises `ValueError` with a readable reason.
        reads: the fields that `convert` reads, except those of the prompt.
    """

    name: str
    keys: str
    matches: Callable[[Row], bool]
    convert: Callable[[Row], Fields]
    reads: frozenset[str]


def convert_row(row: Any, format: str, *, recognised: bool = False) -> Fields:
    """Convert a row to the fields of a `Record`.

    Args:
        row: the row.
        format: a key of `FORMATS`.
        recognised: the format was detected, not given by the user: then an unread field that holds responses,
            scores, turns or a prompt is an error.

    Raises:
        ValueError: unknown format, the row is not an object, a field is missing, of the wrong type or has no place in
            a record.

    Examples:
        >>> convert_row({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "preference")
        {'prompt': '2+2?', 'responses': ['4', '5'], 'ranks': [0, 1]}
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r} is unknown; known formats:\n{known_formats()}")
    if not isinstance(row, Mapping):
        raise ValueError(f"a record must be an object with named fields, not {_kind(row)}")
    # In Parquet and datasets every row has every column: an absent field is None.
    present = {key: value for key, value in row.items() if value is not None}
    fields = FORMATS[format].convert(present)
    if recognised:
        check_all_read(present, FORMATS[format].reads, fields, format)
    if "id" in present and "id" not in fields:
        fields["id"] = present["id"]
    return fields


def detect_format(row: Any) -> str | None:
    """The name of the first format whose keys the row has, or None."""
    if not isinstance(row, Mapping):
        return None
    present = {key: value for key, value in row.items() if value is not None}
    return next((name for name, format in FORMATS.items() if format.matches(present)), None)


def known_formats() -> str:
    """One line per format: name and fields."""
    return "\n".join(f"  {format.name}: {format.keys}" for format in FORMATS.values())


def _from_tuna(row: Row) -> Fields:
    fields = {key: row[key] for key in ("responses", "scores", "ranks") if key in row}
    return {**prompt_of(row, ("prompt",)), **fields}


def _from_scored_outputs(row: Row) -> Fields:
    """`instruction, output[], score[]`; a single `output` text without a score is for supervised fine-tuning."""
    fields = prompt_of(row, ("instruction",))
    output, score = _required(row, "output"), row.get("score")
    if isinstance(output, str):
        return {**fields, "responses": [output]}
    return {**fields, "responses": output, **({} if score is None else {"scores": score})}


def _from_preference(row: Row) -> Fields:
    context, chosen = _last_turn(_required(row, "chosen"), "chosen")
    rejected_context, rejected = _last_turn(_required(row, "rejected"), "rejected")
    if context != rejected_context:
        raise ValueError("'chosen' and 'rejected' answer different conversations: all turns but the last must agree")
    _check_order(row)
    # UltraFeedback and similar datasets repeat the prompt and the chosen answer in `messages`.
    given = {key: value for key, value in row.items() if key != "messages"}
    if "messages" in row:
        messages = turns_of(row["messages"], "messages")
        answered = messages[-1:] == [{"role": "assistant", "content": chosen}]
        if not any(key in row for key in ("prompt", "question", "instruction")) and not context:
            given["messages"] = messages[:-1] if answered else messages
        elif not (answered or messages == context):
            raise ValueError("field 'messages' differs from the conversation of 'chosen' and 'rejected'")
    fields = _asked(given, context)
    return {**fields, "responses": [chosen, rejected], "ranks": [0, 1]}


def _asked(row: Row, context: list[Fields]) -> Fields:
    """The prompt of a preference pair; `context` are the turns before the answers, from none to the whole prompt."""
    keys = ("prompt", "question", "instruction")
    if not context:
        if not any(key in row for key in (*keys, "messages")):
            raise ValueError("field 'prompt' is missing, and 'chosen' has no earlier turns to use instead")
        return prompt_of(row, keys)
    if not any(key in row for key in keys):
        return prompt_of({**row, "messages": context})
    fields = prompt_of(row, keys)
    turns = fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]
    given, told = ([(turn["role"], " ".join(turn["content"].split())) for turn in part] for part in (turns, context))
    if given == told and "prompt" in fields:
        return fields
    if given[-len(told) :] == told:
        return {"messages": turns}  # the prompt has more: a system turn, earlier turns
    system = [turn for turn in turns if turn["role"] == "system"]
    if all(turn in told for turn in given):
        return {"messages": context}
    if all(turn in told for turn in given if turn[0] != "system"):
        if told[0][0] == "system":
            raise ValueError("the row's system text and that of the turns of 'chosen' differ: keep one")
        return {"messages": [*system, *context]}
    raise ValueError(
        "the prompt is not part of the conversation in 'chosen' and 'rejected': make them agree, or give only one"
    )


def _check_order(row: Row) -> None:
    """Scores of the two answers, under any name (`score_chosen`, `chosen-rating`), must not contradict the order."""
    scores: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        words = str(key).lower().replace("-", "_").replace(".", "_").split("_")
        for side in ("chosen", "rejected"):
            if side in words and _is_number(value):
                scores.setdefault("_".join(word for word in words if word != side), {})[side] = value
    for name, sides in scores.items():
        rated = any(word in name for word in ("score", "rating", "reward"))
        if rated and len(sides) == 2 and sides["chosen"] < sides["rejected"]:
            raise ValueError(
                f"the {name} of 'rejected' ({sides['rejected']:g}) is above that of 'chosen' ({sides['chosen']:g}): "
                "which one is better?"
            )


def _from_ranked_answers(row: Row) -> Fields:
    fields = prompt_of(row, ("prompt", "question", "instruction"))
    key = "answers" if "answers" in row else "responses"
    answers = _required(row, key)
    if not isinstance(answers, list):
        raise ValueError(f"field {key!r} must be a list of {{answer, rank}}, not {_kind(answers)}")
    texts, ranks = [], []
    for i, answer in enumerate(answers):
        if not isinstance(answer, Mapping):
            raise ValueError(f"{key}[{i}] must be an object {{answer, rank}}, not {_kind(answer)}")
        check_answer(answer, f"{key}[{i}]")
        text = next((answer[k] for k in ("answer", "response", "text") if answer.get(k) is not None), None)
        if text is None:
            raise ValueError(f"{key}[{i}] has no field 'answer'")
        if answer.get("rank") is None:
            raise ValueError(f"{key}[{i}] has no field 'rank'")
        texts.append(text)
        ranks.append(answer["rank"])
    _check_scores(answers, key)
    return {**fields, "responses": texts, "ranks": ranks}


def _check_scores(answers: Sequence[Mapping[str, Any]], key: str) -> None:
    """Scores given in addition to ranks must not contradict them."""
    for name in ("score", "rating", "reward"):
        rated = [(i, answer) for i, answer in enumerate(answers) if _is_number(answer.get(name))]
        for i, one in rated:
            for j, other in rated:
                ranked = _is_number(one["rank"]) and _is_number(other["rank"])
                if ranked and one["rank"] < other["rank"] and one[name] < other[name]:
                    raise ValueError(
                        f"{key}[{i}] has the better rank and the lower {name} ({one[name]:g}) than {key}[{j}] "
                        f"({other[name]:g}): which one is better?"
                    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _last_turn(answer: Any, name: str) -> tuple[list[Fields], Any]:
    """The earlier turns and the text of an answer given as text, as a turn, or as a conversation that ends with it."""
    if isinstance(answer, Mapping):
        answer = [answer]
    if not isinstance(answer, list):
        return [], answer
    last = answer[-1] if answer else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise ValueError(f"the last turn of {name!r} must be the assistant's")
    turns = turns_of(answer, name)
    return turns[:-1], turns[-1]["content"]


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


# In the order of detection: the first match is used, so the more specific format comes first.
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
            frozenset({"answers"}),
        ),
        Format(
            "tuna",
            "prompt or messages, responses[], scores[] (higher is better) or ranks[] (0 or 1 is best)",
            lambda row: ("prompt" in row or "messages" in row) and "responses" in row,
            _from_tuna,
            frozenset({"responses", "scores", "ranks"}),
        ),
        Format(
            "preference",
            "prompt, chosen, rejected",
            lambda row: "chosen" in row and "rejected" in row,
            _from_preference,
            frozenset({"chosen", "rejected"}),
        ),
        Format(
            "alpaca_eval",
            "instruction, output[], score[], generator[] (score: higher is better)",
            lambda row: "instruction" in row and "output" in row and "generator" in row,
            _from_scored_outputs,
            frozenset({"output", "score", "generator"}),
        ),
        Format(
            "released",
            "instruction, output[], score[], id (score: higher is better)",
            lambda row: "instruction" in row and "output" in row,
            _from_scored_outputs,
            frozenset({"output", "score"}),
        ),
    )
}
