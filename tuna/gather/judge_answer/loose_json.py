"""JSON objects in a model's answer: strict, almost JSON, or cut off; in linear time.

Accepted are single quotes, Python's constants and tuples, unquoted names, missing and trailing commas, raw line breaks
in strings, and unescaped quotation marks inside a string. An incomplete object gives its complete fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tuna.gather.api.bodies import clean_text

__all__ = ["FoundObject", "find_objects"]

DEPTH = 40  # of nesting
_BLANK = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z_][\w-]{0,63}|[0-9]{1,9}", re.ASCII)
_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,6})?", re.ASCII)
_STOP = re.compile(r"[\\\"']")
_FIELD = re.compile(r"""["'][A-Za-z_][\w ]{0,40}["']\s{0,9}:""", re.ASCII)
CONSTANTS = {"true": True, "false": False, "null": None, "none": None, "nan": None, "undefined": None}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


@dataclass
class FoundObject:
    """An object in a text.

    Attributes:
        value: its complete fields.
        start, end: its position.
        whole: whether it was closed.
        open_field: the field within which an incomplete object ends, "" if none.
        twice: fields that occur twice with different values.
    """

    start: int
    value: dict[str, Any] = field(default_factory=dict)
    end: int = 0
    whole: bool = False
    open_field: str = ""
    twice: set[str] = field(default_factory=set)


class _End(Exception):
    """The text ends, or is not JSON from here on."""


def find_objects(text: str) -> Iterator[FoundObject]:
    """The outermost objects of a text, in order. A brace that is not followed by a field starts no object.

    Examples:
        >>> [found.value for found in find_objects("So: {'a': 1,} and {{'b': [1, 2]}} and {'c': 3, 'd': [4")]
        [{'a': 1}, {'b': [1, 2]}, {'c': 3}]
    """
    at = 0
    while (at := text.find("{", at)) >= 0:
        reader = _Reader(text, at)
        found = FoundObject(at)
        try:
            reader.object(found, 0)
            found.whole = True
        except _End:
            pass
        found.end = reader.at
        if found.whole or found.value or found.open_field:
            yield found
            at = max(reader.at, at + 1)
        else:
            at += 1


class _Reader:
    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def object(self, found: FoundObject, depth: int) -> dict[str, Any]:
        self._enter(depth)
        while True:
            char = self._next()
            if char == "}":
                self.at += 1
                return found.value
            if char == ",":
                self.at += 1
                continue
            name = self._name()
            if self._next() != ":":
                raise _End
            self.at += 1
            found.open_field = name
            value = self.value(depth + 1)
            found.open_field = ""
            if name in found.value and found.value[name] != value:
                found.twice.add(name)
            found.value[name] = value

    def value(self, depth: int) -> Any:
        char = self._next()
        if char == "{":
            inner = FoundObject(self.at)
            value = self.object(inner, depth)
            return None if inner.twice else value
        if char in "[(":
            return self._array("]" if char == "[" else ")", depth)
        if char in "\"'":
            return self._string()
        number = _NUMBER.match(self.text, self.at)
        if number is not None:
            self.at = number.end()
            if self.at < len(self.text) and (self.text[self.at].isalnum() or self.text[self.at] == "_"):
                raise _End
            return _number(number[0])
        word = _NAME.match(self.text, self.at)
        if word is None or word[0].lower() not in CONSTANTS:
            raise _End
        self.at = word.end()
        return CONSTANTS[word[0].lower()]

    def _array(self, closing: str, depth: int) -> list[Any]:
        self._enter(depth)
        values: list[Any] = []
        while (char := self._next()) != closing:
            if char == ",":
                self.at += 1
            else:
                values.append(self.value(depth + 1))
        self.at += 1
        return values

    def _enter(self, depth: int) -> None:
        if depth > DEPTH:
            raise _End
        self.at += 1

    def _next(self) -> str:
        """The next character that is not white space."""
        blank = _BLANK.match(self.text, self.at)
        self.at = blank.end() if blank is not None else self.at
        if self.at >= len(self.text):
            raise _End
        return self.text[self.at]

    def _name(self) -> str:
        if self.text[self.at] in "\"'":
            end = self.text.find(self.text[self.at], self.at + 1, self.at + 80)
            if end < 0:
                raise _End
            name = self.text[self.at + 1 : end]
            self.at = end + 1
            return clean_text(name)
        word = _NAME.match(self.text, self.at)
        if word is None:
            raise _End
        self.at = word.end()
        return word[0]

    def _string(self) -> str:
        quote, parts = self.text[self.at], []
        self.at += 1
        while True:
            stop = _STOP.search(self.text, self.at)
            if stop is None:
                self.at = len(self.text)
                raise _End
            parts.append(self.text[self.at : stop.start()])
            self.at = stop.end()
            if stop[0] == "\\":
                parts.append(self._escape())
            elif stop[0] == quote and self._closes():
                # Surrogates that were escaped separately form one character.
                joined = "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                return clean_text(joined)
            else:
                parts.append(stop[0])

    def _escape(self) -> str:
        char = self.text[self.at : self.at + 1]
        self.at += 1
        if char == "u":
            digits = self.text[self.at : self.at + 4]
            if re.fullmatch("[0-9a-fA-F]{4}", digits):
                self.at += 4
                return chr(int(digits, 16))
        return ESCAPES.get(char, char)

    def _closes(self) -> bool:
        """Whether the quotation mark just read ends its string, that is, whether JSON follows."""
        at = self.at
        while at < len(self.text) and at < self.at + 200 and self.text[at].isspace():
            at += 1
        return at >= len(self.text) or self.text[at] in ",:}])" or _FIELD.match(self.text, at) is not None


def _number(text: str) -> int | float | None:
    digits = len(text)
    if digits > 40:
        return None
    try:
        return int(text) if digits <= 18 else float(text)
    except ValueError:
        return float(text)
