"""From the bytes of a request to a validated request, and from an answer to bytes.

Errors in a request are reported to the client from here.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request

from tuna.serve.errors import ApiError, shown

__all__ = ["MAX_BODY", "disconnected", "parse", "read_body", "to_json"]

MAX_BODY = 4 << 20
MAX_DEPTH = 64  # nesting of lists and objects; JSON schemas, the deepest requests, stay below 20
MAX_PARTS = 50_000  # total lists and objects: Python parses them in one call that no other thread can interrupt
DRAINED = 16  # too large bodies are read and discarded up to this multiple of the limit,
DRAIN_SECONDS = 10  # since a client reads the answer only after sending its request
BODY_SECONDS = 60.0  # for a body to arrive, plus the size limit divided by
SLOWEST = 1 << 20  # bytes per second

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, limit: int) -> bytes:
    """Read the JSON text of a request, at most `limit` bytes, regardless of its headers.

    Raises:
        ApiError: it is too long (413), of another type (415), too slow (408), or the client disconnected.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type {shown(kind)} is not supported: send application/json")
    seconds = BODY_SECONDS + limit / SLOWEST
    try:
        return await asyncio.wait_for(_read(request, limit), seconds)
    except asyncio.TimeoutError as error:  # a different class before Python 3.11
        raise ApiError(408, f"the request did not arrive within {seconds:.0f} s", close=True) from error
    except ClientDisconnect as error:
        raise ApiError(499, "the client closed the connection") from error


async def _read(request: Request, limit: int) -> bytes:
    body, size = bytearray(), 0
    deadline = asyncio.get_running_loop().time() + DRAIN_SECONDS
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
            continue
        body.clear()
        if size > DRAINED * limit or asyncio.get_running_loop().time() > deadline:
            break
    if size > limit:
        message = f"the request is larger than the limit of {limit:,} bytes (--max-body)"
        raise ApiError(413, message, code="request_too_large", close=True)
    return bytes(body)


async def disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def parse(body: bytes, model: type[M]) -> M:
    """Parse a body as a request. Slow for large bodies, so not for the event loop.

    Raises:
        ApiError: not JSON, or values not allowed in JSON.
        pydantic.ValidationError: fields that are missing, unknown or invalid.
    """
    if _parts(body) > MAX_PARTS:
        raise ApiError(400, f"the body has more than {MAX_PARTS:,} lists and objects")
    try:
        content = json.loads(body, parse_constant=_not_json)
    except RecursionError as error:
        raise ApiError(400, f"the JSON is nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:  # also text that is not UTF-8, and numbers of thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(json.dumps(content))}")
    for name, value in content.items():
        if problem := _problem(name) or _problem(value):
            raise ApiError(400, f"{shown(name)}: {problem}", param=name if _problem(name) is None else None)
    return model.model_validate(content)


def to_json(answer: Mapping[str, Any]) -> bytes:
    """Serialise an answer as JSON. Items of a list are serialised one by one, so that other threads can run."""
    fields = []
    for name, value in answer.items():
        items = ",".join(map(_written, value)) if isinstance(value, list) else None
        fields.append(f"{_written(name)}:{_written(value) if items is None else f'[{items}]'}")
    return f"{{{','.join(fields)}}}".encode()


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _parts(body: bytes) -> int:
    """An upper bound on the number of lists and objects in a JSON text, in linear time for any bytes."""
    found = body.count(b"[") + body.count(b"{")
    if found <= MAX_PARTS:
        return found
    bare = re.sub(rb'"[^"]*"', b"", re.sub(rb"\\.", b"", body, flags=re.DOTALL))  # brackets in strings do not count
    return bare.count(b"[") + bare.count(b"{")


def _problem(value: Any) -> str | None:
    """What is wrong with a JSON value, independent of its field."""
    left = [(value, 1)]
    while left:
        item, depth = left.pop()
        if isinstance(item, str):
            if not _is_unicode(item):
                return "contains half of a surrogate pair, which is not text"
        elif isinstance(item, float):
            if not math.isfinite(item):
                return "contains a number beyond the range of float64"
        elif isinstance(item, list | dict):
            if depth >= MAX_DEPTH:
                return f"is nested more than {MAX_DEPTH} levels deep"
            left += [(part, depth + 1) for part in item]
            if isinstance(item, dict):
                left += [(part, depth + 1) for part in item.values()]
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
