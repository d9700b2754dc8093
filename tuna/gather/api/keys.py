"""The API key: read from the environment, refused where it cannot be one, and taken out of whatever is written."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from typing import Any
from urllib.parse import quote, quote_plus

__all__ = ["NO_KEY", "Redactor", "api_key"]

NO_KEY = "none"  # what local servers without authentication are sent
MASK = "[key]"
PART = 8  # characters of a key that give it away
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def api_key(variable: str) -> str:
    """The key from the environment, or a placeholder for servers that need none.

    Raises:
        ValueError: `variable` is no name of one, or what it holds cannot be a key. The message does not hold it.
    """
    if not _NAME.fullmatch(variable):
        raise ValueError("--api-key-env takes the name of the environment variable that holds the key, not the key")
    key = os.environ.get(variable, "").strip()
    if not key:
        return NO_KEY
    place = next((place for place, char in enumerate(key, start=1) if not "!" <= char <= "~"), None)
    if place is None and len(key) > 1 and key[0] == key[-1] and key[0] in "\"'`":
        raise ValueError(
            f"${variable} stands in quotation marks ({key[0]}), which are no part of a key: leave them out"
        )
    if place is None:
        return key
    char = key[place - 1]
    what = "a line break" if char in "\r\n" else "a blank" if char.isspace() else f"a character U+{ord(char):04X}"
    raise ValueError(
        f"${variable} holds {what} at character {place} of {len(key)}; an API key is printable ASCII without "
        "blanks. Set it to the key alone, without 'Bearer'"
    )


class Redactor:
    """Takes a key out of texts, in every form that a server or a library may repeat it in."""

    def __init__(self, key: str) -> None:
        self._whole: re.Pattern[str] | None = None
        self._echo: re.Pattern[str] | None = None
        self._windows: set[str] = set()
        # A word such as "none", "EMPTY" or "dummy" is no secret, and may stand in any answer.
        self._secret = len(key) >= 2 * PART or (len(key) >= PART and any(char.isdigit() for char in key))
        if key == NO_KEY or len(key) < 4:
            return
        forms = _forms(key)
        patterns = [re.escape(form) for form in sorted(forms, key=len, reverse=True)]
        if self._secret:
            # Broken over lines, or with blanks between its characters.
            patterns.append(r"[\s\u200b-\u200f\ufeff]{0,4}".join(map(re.escape, key)))
        self._whole = re.compile("|".join(patterns), re.IGNORECASE)
        if self._secret:
            self._echo = re.compile(
                rf"{re.escape(key[:3])}[\w-]{{0,12}}[*.…•]{{2,64}}[\w-]{{0,12}}"
            )  # sk-proj-****abcd
            self._windows = {form.lower()[at : at + PART] for form in forms for at in range(len(form) - PART + 1)}

    def text(self, text: str) -> str:
        """A message (its first 4000 characters) without the key or a telling part of it."""
        text = text[:4000]
        if self._whole is None:
            return text
        text = self._whole.sub(MASK, text)
        return text if self._echo is None else self._without_parts(self._echo.sub(MASK, text))

    def value(self, value: Any) -> Any:
        """A JSON value whose texts do not hold the whole key (an answer may hold what looks like a part of it)."""
        if self._whole is None or not self._secret:
            return value
        if isinstance(value, str):
            return self._whole.sub(MASK, value)
        if isinstance(value, dict):
            return {name: self.value(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.value(item) for item in value)
        return value

    def _without_parts(self, text: str) -> str:
        lower = text.lower()
        if len(lower) != len(text):  # a letter whose small form is longer
            lower = text
        kept, at = [], 0
        while at < len(text):
            if lower[at : at + PART] not in self._windows:
                kept.append(text[at])
                at += 1
                continue
            while lower[at : at + PART] in self._windows:
                at += 1
            at += PART - 1
            kept.append(MASK)
        return "".join(kept)


def _forms(key: str) -> set[str]:
    """The key as it is, quoted for addresses, JSON, Python and HTML, and in base64 and hexadecimal digits."""
    content = key.encode()
    escaped = {json.dumps(key)[1:-1], repr(key)[1:-1], html.escape(key), json.dumps(key)[1:-1].replace("/", r"\/")}
    quoted = {quote(key), quote(key, safe=""), quote_plus(key), quote(quote(key, safe=""), safe="")}
    encoded = {content.hex(), content.hex(" "), content.hex(":"), str(list(content))[1:-1]}
    encoded |= {"".join(before + f"{byte:02x}" for byte in content) for before in ("%", r"\x", r"\u00")}
    for before in range(3):  # base64 of a text that the key stands in depends on where it begins there
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            # Leave out the characters that bits of the neighbours are in.
            text = encode(b"\0" * before + content).decode().rstrip("=")
            first, last = -(-8 * before // 6), 8 * (before + len(content)) // 6
            encoded.add(text[first:last])
    return {form for form in (key, *escaped, *quoted, *encoded) if len(form) >= min(PART, len(key))}
