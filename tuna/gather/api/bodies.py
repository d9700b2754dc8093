"""From the bytes of an HTTP answer to a JSON value, within bounds: the first half of the gate before the journal.

The second half, what the value must hold, is `tuna.gather.api.answers`. Whatever a server sends ends as a value or as
`UnusableAnswer`: a body without end, one that unpacks to gigabytes, numbers of thousands of digits, JSON nested a
million deep, text in no known encoding.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import AsyncIterator
from typing import Any

__all__ = ["MOST_BYTES", "UnusableAnswer", "clean_text", "parse_json", "read_body", "short"]

MOST_BYTES = 16 * 2**20  # of a body, unpacked; 16 choices of 4096 tokens with log-probabilities take about half
MOST_DIGITS = 18  # of an integer; a longer one is read as a float, which no count or log-probability may be
ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
_MARKUP = re.compile(r"<[^<>]*>")


class UnusableAnswer(ValueError):
    """An answer that came (and was paid for) but is not what was asked for. Raised by parsers.

    Attributes:
        again: whether another attempt may bring a better one.
    """

    def __init__(self, message: str, *, again: bool = True) -> None:
        super().__init__(message)
        self.again = again


def clean_text(text: str) -> str:
    """`text` with halves of surrogate pairs and NUL, which no UTF-8 file can hold or should, as U+FFFD.

    Examples:
        >>> clean_text("half an emoji \\ud83d")
        'half an emoji \ufffd'
    """
    return _UNWRITABLE.sub("\ufffd", text)


def short(text: str, most: int = 300) -> str:
    """`text` as one line of at most `most` characters, without control characters."""
    text = " ".join(clean_text(text[: 20 * most]).split())
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return text if len(text) <= most else text[: most - 1] + "…"


async def read_body(chunks: AsyncIterator[bytes], encoding: str, most: int = MOST_BYTES) -> bytes:
    """A body as it comes, unpacked.

    Args:
        chunks: as they come from the socket.
        encoding: the content-encoding: none, gzip or deflate.
        most: bytes that the unpacked body may have.

    Raises:
        UnusableAnswer: a longer body, another encoding, or bytes that are not in it.
    """
    encoding = encoding.strip().lower()
    if encoding not in ENCODINGS:
        raise UnusableAnswer(f"its content-encoding {short(encoding, 40)!r} was not asked for")
    packed = zlib.decompressobj(47) if encoding not in ("", "identity") else None  # 47: gzip or zlib, by its head
    parts, size = [], 0
    async for chunk in chunks:
        try:
            part = chunk if packed is None else packed.decompress(chunk, most - size + 1)
        except zlib.error as error:
            raise UnusableAnswer(f"it is no {encoding}: {error}") from error
        size += len(part)
        if size > most:
            raise UnusableAnswer(
                f"it is longer than {most:,} bytes; ask for fewer choices (--n) or tokens", again=False
            )
        parts.append(part)
    if packed is not None and not packed.eof:
        raise UnusableAnswer(f"its {encoding} is cut off")
    return b"".join(parts)


def parse_json(content: bytes, *, unique: bool = True) -> Any:
    """The JSON value of a body. Numbers beyond `MOST_DIGITS` and NaN come as floats; no integer is long.

    Args:
        content: UTF-8, or UTF-16 and UTF-32 as JSON text may be.
        unique: refuse objects with a field twice.

    Raises:
        UnusableAnswer: no JSON text; the message says what it is instead.
    """
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise UnusableAnswer(f"it is no UTF-8 text (byte {error.start + 1})") from error
    if not text.strip():
        raise UnusableAnswer("it is empty")
    try:
        return json.loads(text, parse_int=_integer, object_pairs_hook=_object if unique else None)
    except json.JSONDecodeError as error:
        raise UnusableAnswer(_described(text, error)) from error
    except RecursionError:
        raise UnusableAnswer("its JSON is nested too deep") from None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UnusableAnswer("its JSON has a field twice")
    return found


def _described(text: str, error: json.JSONDecodeError) -> str:
    start = text[:2000].lstrip()
    if start.startswith("<"):
        return f"it is no JSON but a page (check --base-url): {short(_MARKUP.sub(' ', start), 100)}"
    if start.startswith(("data:", "event:", ": ")):
        return "it is no JSON but a stream of events, which was not asked for"
    return f"it is no JSON ({error.msg} at character {error.pos + 1} of {len(text)}): {short(start, 80)}"
