"""The prompt of a row of data: a text or turns, and other fields that belong to it.

Nothing that belongs to a prompt is dropped. Fields with one clear meaning are converted: a `system` text becomes the
first turn, `input` follows its instruction on the next line (as in Alpaca), a `history` of exchanges becomes turns.
Anything else (tool calls, images, two prompts that disagree) is an error that names the field and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

__all__ = [
    "Fields",
    "Row",
    "check_answer",
    "check_carried",
    "check_turn",
    "check_unread_prompt",
    "is_empty",
    "joined",
    "prompt_of",
    "turn_of",
    "turns_of",
]

Row: TypeAlias = Mapping[str, Any]
Fields: TypeAlias = dict[str, Any]

PROMPT_KEYS = ("prompt", "question", "instruction", "query")
SYSTEM_KEYS = (
    "system", "system_prompt", "system_message", "system_instruction", "system_text", "sys_prompt", "systemPrompt"
)  # fmt: skip
USED = (*PROMPT_KEYS, *SYSTEM_KEYS, "messages", "input", "history")
"""Fields that `prompt_of` reads or compares."""

PLAIN = 24  # characters from which on a text found inside another one is no coincidence

NOT_CARRIED = (
    "tools", "functions", "tool_calls", "function_call", "tool_choice", "chat_template_kwargs", "documents",
    "image", "images", "video", "videos", "audio", "audios", "context", "contexts", "document", "passage", "passages",
    "article", "articles", "background", "suffix",
)  # fmt: skip
"""Fields of a row that change the model's input and have no place in a record."""
REASONING = ("reasoning_content", "reasoning", "thinking", "thoughts")
TURN_NOTES = frozenset({
    "id", "uuid", "turn", "index", "turn_id", "turn_identifier", "timestamp", "created", "created_at", "model", "lang",
    "language", "source", "country", "hashed_ip", "header", "state", "openai_id", "token_counter", "end_turn",
})  # fmt: skip
"""Metadata fields of a turn."""


def prompt_of(row: Row, keys: Sequence[str] = PROMPT_KEYS) -> Fields:
    """The prompt of a row as `prompt` (a text) or `messages` (turns of `role` and `content`).

    Args:
        row: without the fields that are None.
        keys: fields that may hold the prompt, in addition to `messages`.

    Raises:
        ValueError: no prompt, two prompts that disagree, or a field that cannot be represented in a record.

    Examples:
        >>> prompt_of({"instruction": "Translate.", "input": "good morning"})
        {'prompt': 'Translate.\\ngood morning'}
        >>> prompt_of({"system": "Be brief.", "prompt": "2+2?"})["messages"][0]
        {'role': 'system', 'content': 'Be brief.'}
    """
    check_carried(row)
    found = next((key for key in (*keys, "messages") if key in row), None)
    if found is None:
        raise ValueError("field " + " or ".join(map(repr, keys)) + " is missing")
    prompt = _with_input(row, found, row[found])
    if found != "messages" and not is_empty(row.get("messages")) and _says(row["messages"], prompt):
        found, prompt = "messages", row["messages"]
    for other in (*PROMPT_KEYS, "messages"):
        if other != found and other in row and not _says(prompt, row[other]):
            raise ValueError(
                f"fields {found!r} and {other!r} both hold a prompt, and they disagree: keep the one that was answered"
            )
    return _with_turns_before(row, turns_of(prompt, found) if isinstance(prompt, list) else prompt)


def _with_input(row: Row, key: str, prompt: Any) -> Any:
    """Append Alpaca's `input`, the text that the instruction refers to."""
    context = row.get("input")
    if is_empty(context) or context == prompt:
        return prompt
    if not isinstance(prompt, str) or not isinstance(context, str):
        raise ValueError(f"field 'input' cannot be joined to {key!r}: both must be text")
    return prompt if _stands_in(context, prompt) else f"{prompt}\n{context}"


def _with_turns_before(row: Row, prompt: Any) -> Fields:
    """The prompt after the row's system text and history; turns if the row has either."""
    system = _system_of(row)
    before = _history_of(row)
    if not isinstance(prompt, list):
        if system is None and not before:
            return {"prompt": prompt}
        prompt = [{"role": "user", "content": prompt}]
    given = [turn["content"] for turn in prompt if turn["role"] == "system"]
    if system is not None and system not in given:
        if given:
            raise ValueError("the row's system text and that of its turns differ: keep one")
        before = [{"role": "system", "content": system}, *before]
    return {"messages": [*before, *prompt]}


def _system_of(row: Row) -> str | None:
    found = {key: row[key] for key in SYSTEM_KEYS if not is_empty(row.get(key))}
    for key, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"field {key!r} must be text")
    if len(set(found.values())) > 1:
        raise ValueError(f"fields {' and '.join(map(repr, found))} disagree: keep one system text")
    return next(iter(found.values()), None)


def _history_of(row: Row) -> list[Fields]:
    """Earlier exchanges, `[[question, answer], …]` or turns."""
    history = row.get("history")
    if is_empty(history):
        return []
    if isinstance(history, list) and all(isinstance(turn, Mapping) for turn in history):
        return turns_of(history, "history")
    exchanges: list[Any] = history if isinstance(history, list) else [history]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in exchanges):
        raise ValueError("field 'history' must be a list of [question, answer], or of turns {role, content}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in exchanges for role, text in zip(roles, pair, strict=True)]


def check_carried(row: Row) -> None:
    """Reject fields that change the prompt and have no place in a record.

    Raises:
        ValueError: names the field.
    """
    for key in NOT_CARRIED:
        if not is_empty(row.get(key)) and row[key] not in ("[]", "{}"):
            raise ValueError(
                f"field {key!r} has no place in a record: render it into the text of the prompt "
                "(template = 'none'), or remove it"
            )


def check_answer(answer: Row, name: str, *, reasoning: bool = False) -> None:
    """Reject an answer given as an object with more than its text: a tool call, an image, separate reasoning.

    Args:
        answer: the object.
        name: its name in the error.
        reasoning: accept the field `reasoning`.

    Raises:
        ValueError: names the field.
    """
    for key in (*NOT_CARRIED, *REASONING):
        if not is_empty(answer.get(key)) and not (reasoning and key == "reasoning"):
            raise ValueError(
                f"{name} has {key!r}, which has no place in a record: render it into the text, or remove it"
            )


def check_unread_prompt(row: Row) -> None:
    """Reject, in the fields of a record, those that only `prompt_of` converts.

    Raises:
        ValueError: names the field.
    """
    check_carried(row)
    for key in (*SYSTEM_KEYS, "input", "history"):
        if not is_empty(row.get(key)):
            raise ValueError(
                f"field {key!r} is not a field of a record: put it into 'messages', or read rows with read_records"
            )


def turns_of(turns: Any, name: str) -> list[Fields]:
    """The turns of a conversation, each reduced to `role` and `content`.

    Raises:
        ValueError: an item is not a turn or has more than text; the message names it.
    """
    if not isinstance(turns, list):
        raise ValueError(f"field {name!r} must be a list of turns {{role, content}}")
    return [_named_turn(turn, f"{name}[{place}]") for place, turn in enumerate(turns)]


def _named_turn(turn: Any, name: str) -> Fields:
    try:
        return turn_of(turn)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def check_turn(turn: Row) -> None:
    """Reject a turn with content that has no place in a record (a tool call, an image, separate reasoning).

    Raises:
        ValueError: names the field.
    """
    for key, value in turn.items():
        noted = isinstance(value, bool | int | float) or str(key) in TURN_NOTES
        if key not in ("role", "content") and not is_empty(value) and not noted:
            raise ValueError(
                f"has {key!r}, which has no place in a record: render it into the text of the turn, or remove it"
            )


def turn_of(turn: Any) -> Fields:
    """A turn reduced to `role` and `content`; parts of text are joined.

    Raises:
        ValueError: not an object, no text, or content without a place in a record (a tool call, an image, separate
            reasoning).
    """
    if not isinstance(turn, Mapping):
        raise ValueError("must be an object {role, content}")
    check_turn(turn)
    content = joined(turn.get("content"))
    if not isinstance(turn.get("role"), str) or not isinstance(content, str):
        wrong = "role" if not isinstance(turn.get("role"), str) else "content"
        raise ValueError(f"must have {wrong!r} as text (fields: {', '.join(map(str, turn)) or 'none'})")
    return {"role": turn["role"], "content": content}


def is_empty(value: Any) -> bool:
    """Whether a value is null, a blank text, an empty list or object, or a list or object of such values."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):  # in parquet every object has the fields of all
        return all(is_empty(part) for part in value.values())
    return value is None or (isinstance(value, list | tuple) and all(is_empty(part) for part in value))


def joined(content: Any) -> Any:
    """The content of a turn as one text; a list of text parts is joined.

    Raises:
        ValueError: a part is not text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise ValueError("has a part that is not text, which has no place in a record")
        texts.append(text)
    return "".join(texts)


def _says(prompt: Any, other: Any) -> bool:
    """Whether `prompt` contains all of `other`."""
    if is_empty(other) or other == prompt:
        return True
    turns = prompt if isinstance(prompt, list) else []
    texts = (
        [prompt] if isinstance(prompt, str) else [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    )
    if isinstance(other, list):
        said = [turn.get("content") for turn in other if isinstance(turn, Mapping)]
        return bool(said) and all(text in texts for text in said)
    return any(isinstance(text, str) and isinstance(other, str) and _stands_in(other, text) for text in texts)


def _stands_in(part: str, text: str) -> bool:
    """Whether `text` was made from `part`: contains it as whole lines, or `part` is too long for a coincidence."""
    part = part.strip()
    return f"\n{part}\n" in f"\n{text.strip()}\n" or (len(part) >= PLAIN and part in text)
