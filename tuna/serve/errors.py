"""Errors in the format of the OpenAI API."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuna.system.validation import reason

__all__ = ["ApiError", "Ending", "answer_errors", "shown"]

SHOWN = 80  # characters of a client's value repeated in a message


class ApiError(Exception):
    """An error sent to the client in OpenAI's format; with `close` the connection is closed afterwards."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.close = status, message, param, code, close

    def response(self) -> JSONResponse:
        """`{"error": {message, type, param, code}}`."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else None
        body = {"message": self.message, "type": kind or "invalid_request_error"}
        more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(self.status, {})
        headers = more | ({"Connection": "close"} if self.close else {})
        return JSONResponse({"error": body | {"param": self.param, "code": self.code}}, self.status, headers)


class Ending:
    """ASGI middleware that answers requests cancelled by a shutdown of the server with status 503."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request; a cancellation ends without a traceback."""
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except asyncio.CancelledError:  # raised by uvicorn when the time for running requests is over
            if scope["type"] == "http" and not started:
                await ApiError(503, "the server is shutting down").response()(scope, receive, send)


def answer_errors(app: FastAPI) -> None:
    """Convert all errors of `app` to OpenAI's format: `ApiError`, invalid fields, unknown routes, unexpected ones."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(ValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ValueError, _bad_value)
    app.add_exception_handler(Exception, _unexpected)


async def _api_error(request: Request, error: Any) -> Response:
    response: Response = error.response()
    return response


async def _invalid(request: Request, error: Any) -> Response:
    """One message for the first problems; `param` is the field of the first."""
    details = error.errors()
    places = [shown(".".join(map(str, detail["loc"])), quoted=False) for detail in details]
    reasons = [reason(detail) for detail in details]
    problems = [f"{place}: {why}" if place else why for place, why in zip(places, reasons, strict=True)]
    unknown = details[0]["type"] == "extra_forbidden"
    message = "; ".join(problems[:3])[: 10 * SHOWN]
    return ApiError(400, message, param=places[0] or None, code="unknown_parameter" if unknown else None).response()


async def _http_error(request: Request, error: Any) -> Response:
    path = shown(request.url.path, quoted=False)
    return ApiError(error.status_code, f"{request.method} {path}: {error.detail}").response()


async def _bad_value(request: Request, error: Any) -> Response:
    return ApiError(400, shown(str(error), 10 * SHOWN, quoted=False)).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    return ApiError(500, f"{type(error).__name__}: {error}").response()


def shown(value: str, most: int = SHOWN, *, quoted: bool = True) -> str:
    """A client's text for a message: truncated, and if quoted without line breaks and control characters."""
    text = value if len(value) <= most else value[: most - 1] + "…"
    return repr(text) if quoted else text
