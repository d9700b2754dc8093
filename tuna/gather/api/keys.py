"""The API key: read from the environment, validated, and removed from everything written."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from typing import Any
from urllib.parse import quote, quote_plus

__all__ = ["NO_KEY", "Redactor", "api_key"]

NO_KEY = "none"  # sent to local servers without authentication
MASK = "[key]"
PART = 8  # characters of a key that identify it
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def api_key(variable: str) -> str:
    """The key from the environment, or a placeholder for servers that need none.

    Raises:
        ValueError: `variable` is not a variable name, or its value is not a valid key. The message does not contain it.
    """
    if not _NAME.fullmatch(variable):
        raise ValueError("--api-key-env takes the name of the environment variable with the key, not the key")
    key = os.environ.get(variable, "").strip()
    if not key:
        return NO_KEY
    place = next((place for place, char in enumerate(key, start=1) if not "!" <= char <= "~"), None)
    if place is None and len(key) > 1 and key[0] == key[-1] and key[0] in "\"'`":
        raise ValueError(
            f"${variable} is enclosed in quotation marks ({key[0]}), which are not part of a key: remove them"
        )
    if place is None:
        return key
    char = key[place - 1]
    what = "a line break" if char in "\r\n" else "a space" if char.isspace() else f"a character U+{ord(char):04X}"
    raise ValueError(
        f"${variable} contains {what} at character {place} of {len(key)}; an API key is printable ASCII without "
        "spaces. Set it to the key only, without 'Bearer'"
    )


class Redactor:
    """Removes a key from texts, in every form in which a server or a library may repeat it."""

    def __init__(self, key: str) -> None:
        self._whole: re.Pattern[str] | None = None
        self._echo: re.Pattern[str] | None = None
        self._windows: set[str] = set()
        # A word such as "none", "EMPTY" or "dummy" is not a secret and may occur in any answer.
        self._secret = len(key) >= 2 * PART or (len(key) >= PART and any(char.isdigit() for char in key))
        if key == NO_KEY or len(key) < 4:
            return
        forms = _forms(key)
        patterns = [re.escape(form) for form in sorted(forms, key=len, reverse=True)]
        if self._secret:
            # Broken over lines, or with spaces between its characters.
            patterns.append(r"[\s\u200b-\u200f\ufeff]{0,4}".join(map(re.escape, key)))
        self._whole = re.compile("|".join(patterns), re.IGNORECASE)
        if self._secret:
            self._echo = re.compile(
                rf"{re.escape(key[:3])}[\w-]{{0,12}}[*.…•]{{2,64}}[\w-]{{0,12}}"
            )  # sk-proj-****abcd
            self._windows = {form.lower()[at : at + PART] for form in forms for at in range(len(form) - PART + 1)}

    def text(self, text: str) -> str:
        """A message (its first 4000 characters) without the key or an identifying part of it."""
        text = text[:4000]
        if self._whole is None:
            return text
        text = self._whole.sub(MASK, text)
        return text if self._echo is None else self._without_parts(self._echo.sub(MASK, text))

    def value(self, value: Any) -> Any:
        """A JSON value without the whole key in its texts (an answer may contain text that resembles a part of it)."""
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
        if len(lower) != len(text):  # a letter whose lower-case form is longer
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
    """The key verbatim, quoted for URLs, JSON, Python and HTML, and in base64 and hexadecimal."""
    content = key.encode()
    escaped = {json.dumps(key)[1:-1], repr(key)[1:-1], html.escape(key), json.dumps(key)[1:-1].replace("/", r"\/")}
    quoted = {quote(key), quote(key, safe=""), quote_plus(key), quote(quote(key, safe=""), safe="")}
    encoded = {content.hex(), content.hex(" "), content.hex(":"), str(list(content))[1:-1]}
    encoded |= {"".join(before + f"{byte:02x}" for byte in content) for before in ("%", r"\x", r"\u00")}
    for before in range(3):  # base64 of a text that contains the key depends on the key's position
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            # Skip the characters that include bits of the neighbours.
            text = encode(b"\0" * before + content).decode().rstrip("=")
            first, last = -(-8 * before // 6), 8 * (before + len(content)) // 6
            encoded.add(text[first:last])
    return {form for form in (key, *escaped, *quoted, *encoded) if len(form) >= min(PART, len(key))}
