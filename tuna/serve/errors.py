"""Errors in the shape clients of the OpenAI API expect, whatever went wrong."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

__all__ = ["ApiError", "answer_errors"]


class ApiError(Exception):
    """An error the client is told of, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> JSONResponse:
        """``{"error": {message, type, param, code}}``."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else None
        body = {"message": self.message, "type": kind or "invalid_request_error"}
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse({"error": body | {"param": self.param, "code": self.code}}, self.status, headers)


def answer_errors(app: FastAPI) -> None:
    """Give every error of ``app`` OpenAI's shape: ours, bad fields, unknown routes, and what nobody foresaw."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ValueError, _bad_value)
    app.add_exception_handler(Exception, _unexpected)


async def _api_error(request: Request, error: Any) -> Response:
    response: Response = error.response()
    return response


async def _invalid(request: Request, error: Any) -> Response:
    """One message of the first problems; `param` is the field of the first."""
    details = error.errors()
    places = [".".join(str(part) for part in detail["loc"][1:]) for detail in details]
    problems = [
        f"{place}: {detail['msg']}" if place else detail["msg"] for place, detail in zip(places, details, strict=True)
    ]
    unknown = details[0]["type"] == "extra_forbidden"
    message = "; ".join(problems[:3]).replace("Value error, ", "")
    return ApiError(400, message, param=places[0] or None, code="unknown_parameter" if unknown else None).response()


async def _http_error(request: Request, error: Any) -> Response:
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


async def _bad_value(request: Request, error: Any) -> Response:
    return ApiError(400, str(error)).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    return ApiError(500, f"{type(error).__name__}: {error}").response()
