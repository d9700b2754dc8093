"""From the bytes of an HTTP answer to a JSON value, with limits; step one of the validation before the journal.

Step two, the validation of the value, is `tuna.gather.api.answers`. Everything a server sends becomes a value or an
`UnusableAnswer`: an endless body, one that decompresses to gigabytes, numbers of thousands of digits, JSON nested a
million levels deep, text in an unknown encoding.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import AsyncIterator
from typing import Any

__all__ = ["MOST_BYTES", "UnusableAnswer", "clean_text", "parse_json", "read_body", "short"]

MOST_BYTES = 16 * 2**20  # of a decompressed body; 16 choices of 4096 tokens with log-probabilities take about half
MOST_DIGITS = 18  # of an integer; a longer one is read as a float, which is not accepted as a count
ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
_MARKUP = re.compile(r"<[^<>]*>")


class UnusableAnswer(ValueError):
    """An answer was received (and paid for) but cannot be used. Raised by parsers.

    Attributes:
        again: whether a retry may give a better one.
    """

    def __init__(self, message: str, *, again: bool = True) -> None:
        super().__init__(message)
        self.again = again


def clean_text(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot encode, and NUL replaced by U+FFFD.

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
    """Read and decompress a body.

    Args:
        chunks: the chunks from the socket.
        encoding: the content-encoding: none, gzip or deflate.
        most: maximum number of bytes of the decompressed body.

    Raises:
        UnusableAnswer: a longer body, another encoding, or invalid bytes.
    """
    encoding = encoding.strip().lower()
    if encoding not in ENCODINGS:
        raise UnusableAnswer(f"its content-encoding {short(encoding, 40)!r} was not requested")
    packed = zlib.decompressobj(47) if encoding not in ("", "identity") else None  # 47: gzip or zlib, by its header
    parts, size = [], 0
    async for chunk in chunks:
        try:
            part = chunk if packed is None else packed.decompress(chunk, most - size + 1)
        except zlib.error as error:
            raise UnusableAnswer(f"it is not {encoding}: {error}") from error
        size += len(part)
        if size > most:
            raise UnusableAnswer(
                f"it is longer than {most:,} bytes; request fewer choices (--n) or tokens", again=False
            )
        parts.append(part)
    if packed is not None and not packed.eof:
        raise UnusableAnswer(f"its {encoding} is truncated")
    return b"".join(parts)


def parse_json(content: bytes, *, unique: bool = True) -> Any:
    """Parse a body as JSON. Numbers of more than `MOST_DIGITS` digits and NaN become floats.

    Args:
        content: UTF-8, UTF-16 or UTF-32.
        unique: reject objects with duplicate fields.

    Raises:
        UnusableAnswer: not JSON; the message says what it is instead.
    """
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise UnusableAnswer(f"it is not UTF-8 text (byte {error.start + 1})") from error
    if not text.strip():
        raise UnusableAnswer("it is empty")
    try:
        return json.loads(text, parse_int=_integer, object_pairs_hook=_object if unique else None)
    except json.JSONDecodeError as error:
        raise UnusableAnswer(_described(text, error)) from error
    except RecursionError:
        raise UnusableAnswer("its JSON is nested too deeply") from None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UnusableAnswer("its JSON has a duplicate field")
    return found


def _described(text: str, error: json.JSONDecodeError) -> str:
    start = text[:2000].lstrip()
    if start.startswith("<"):
        return f"it is not JSON but a web page (check --base-url): {short(_MARKUP.sub(' ', start), 100)}"
    if start.startswith(("data:", "event:", ": ")):
        return "it is not JSON but a stream of events, which was not requested"
    return f"it is not JSON ({error.msg} at character {error.pos + 1} of {len(text)}): {short(start, 80)}"
