"""Errors of pydantic in plain words, without its jargon of types and validators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["place", "reason"]

MESSAGES = {
    "missing": "is missing",
    "extra_forbidden": "is unknown",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}
WANTED = {
    "string_type": "text",
    "list_type": "a list",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "an object {role, content}",
    "dict_type": "an object {role, content}",
}


def place(location: Sequence[int | str]) -> str:
    """The location `("messages", 0, "role")` as `messages[0].role`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def reason(detail: Any) -> str:
    """One of `ValidationError.errors()` in words, to follow the name of the value."""
    kind = detail["type"]
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind in WANTED:
        return f"must be {WANTED[kind]}, not {_short(detail['input'])}"
    return MESSAGES.get(kind, str(detail["msg"]))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
