"""One request to an OpenAI-compatible endpoint, asked until it is answered: the official client, our patience.

The client's own retries are off, since it gives up on long waits, knows no total deadline and reports nothing.
What happens to an attempt:

| the endpoint | we |
|---|---|
| answers with a JSON object that the caller can use | are done |
| 408, 409, 425, 429, 500 and above | wait (Retry-After, or exponential back-off with jitter), try again |
| cuts the connection, is too slow, sends no JSON or an unusable object | the same; the call counts as lost |
| 401, 402, 403, 404, or 429 for an empty account | stop the run: every other call would fare the same |
| asks all to wait beyond the total timeout | the same |
| any other status (400: too long a prompt, …) | give this one up and say why |
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import urlsplit

__all__ = [
    "Api",
    "Attempt",
    "CallFailed",
    "Endpoint",
    "EndpointRefused",
    "EndpointSettings",
    "UnusableAnswer",
    "api_key",
    "retry_after",
]

T = TypeVar("T")
Api = Literal["completions", "chat"]
PATHS: dict[Api, str] = {"completions": "/completions", "chat": "/chat/completions"}
RETRIED = frozenset({408, 409, 425, 429})
STOPPING = frozenset({401, 402, 403, 404})
NO_KEY = "none"  # what local servers without authentication are sent


class UnusableAnswer(ValueError):
    """An answer that came (and was paid for) but is not what was asked for. Raised by parsers."""


class CallFailed(Exception):
    """A call was given up; ``status`` is that of the last answer, None where there was none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EndpointRefused(CallFailed):
    """The endpoint takes no call of ours at all: key, account, address or model."""


@dataclass(frozen=True)
class EndpointSettings:
    """Where and how patiently to ask.

    Attributes:
        base_url: with the version: ``https://api.openai.com/v1``, ``http://localhost:8000/v1``.
        key_variable: environment variable that holds the key. The key itself is in no field, file or log.
        requests_per_minute: at most so many requests, evenly spaced; None: no limit of ours.
        request_timeout: seconds an attempt may take.
        total_timeout: seconds a call may take with all its attempts and waits.
        max_attempts: requests a call may take.
        backoff: seconds before the second attempt, doubled each time, with full jitter on the upper half.
        max_backoff: most seconds of a back-off. A Retry-After may ask for more.

    Raises:
        ValueError: a value outside its range; a base URL that is none, or holds credentials.
    """

    base_url: str
    key_variable: str = "OPENAI_API_KEY"
    requests_per_minute: float | None = None
    request_timeout: float = 120.0
    total_timeout: float = 900.0
    max_attempts: int = 6
    backoff: float = 1.0
    max_backoff: float = 60.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query:
            raise ValueError(f"base_url must hold no credentials or query; put the key into ${self.key_variable}")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"base_url = {self.base_url!r} is no http or https address")
        for name in ("request_timeout", "total_timeout", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value} must be above 0")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts = {self.max_attempts} must be at least 1")
        if not (self.backoff >= 0 and self.max_backoff >= 0):
            raise ValueError(f"backoff = {self.backoff} and max_backoff = {self.max_backoff} must be at least 0")


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended without a usable answer.

    Attributes:
        reason: in plain words, without secrets.
        billed: whether it was, or may have been, paid for.
        status: HTTP status, None where none came.
        wait: seconds the endpoint asks to wait, None where it does not say.
    """

    reason: str
    billed: bool
    status: int | None = None
    wait: float | None = None


@dataclass(frozen=True)
class _Usable(Generic[T]):
    value: T  # wrapped: T could itself be anything


def api_key(variable: str) -> str:
    """The key from the environment, or a placeholder for servers that need none."""
    return os.environ.get(variable, "").strip() or NO_KEY


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that ``retry-after-ms`` or ``Retry-After`` (seconds or an HTTP date) ask for; None without one.

    Example:
        >>> retry_after({"retry-after": "2.5"}), retry_after({"retry-after-ms": "300"}), retry_after({})
        (2.5, 0.3, None)
        >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=20.0)
        40.0
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                moment = email.utils.parsedate_to_datetime(text).timestamp()
            except (ValueError, TypeError, OverflowError):
                continue
            seconds = moment - (time.time() if now is None else now)
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


class Endpoint:
    """A client with our patience. Use as an asynchronous context manager.

    Attributes:
        requests, retries, refused, waited: requests sent, those beyond the first of a call, answers of 429, and
            seconds spent waiting (summed over calls).
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.requests, self.retries, self.refused, self.waited = 0, 0, 0, 0.0
        self._key = api_key(settings.key_variable)
        self._clear_at = 0.0  # no request before this (loop time): a Retry-After holds for all
        self._next_slot = 0.0  # of the rate limit

    async def __aenter__(self) -> Endpoint:
        import openai

        try:
            self._client = openai.AsyncOpenAI(
                base_url=self.settings.base_url,
                api_key=self._key,
                max_retries=0,
                timeout=self.settings.request_timeout,
            )
        except openai.OpenAIError as error:
            raise ValueError(self.redact(str(error))) from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    def redact(self, text: str) -> str:
        """``text`` without the key."""
        return text.replace(self._key, "[key]") if self._key != NO_KEY else text

    async def call(
        self,
        api: Api,
        body: Mapping[str, Any],
        parse: Callable[[Any], T],
        *,
        before: Callable[[], Awaitable[None]],
        after: Callable[[Attempt], Awaitable[None]],
    ) -> T:
        """Ask until there is a usable answer.

        Args:
            api: "completions" or "chat".
            body: the request.
            parse: makes of the answer (a JSON value) what is wanted, or raises `UnusableAnswer`.
            before: awaited before each attempt (a budget may refuse it by raising).
            after: awaited after each attempt that brought nothing usable.

        Raises:
            CallFailed: given up, with the reasons of the last attempt; `EndpointRefused` where every call would be.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.total_timeout
        attempt = 0
        while True:
            attempt += 1
            await self._wait_turn(deadline)
            await before()
            self.requests += 1
            self.retries += attempt > 1
            outcome = await self._attempt(api, body, parse, max(0.001, deadline - loop.time()))
            if isinstance(outcome, _Usable):
                return outcome.value
            await after(outcome)
            self._raise_if_hopeless(outcome)
            if attempt == self.settings.max_attempts:
                raise CallFailed(f"given up after {attempt} attempts, the last: {outcome.reason}", outcome.status)
            wait = self._wait_after(attempt, outcome)
            if loop.time() + wait > deadline:
                late = f"{outcome.reason}; the next attempt is due in {wait:.1f} s, beyond {self._limit()}"
                # Where the endpoint puts everybody off so long, the other calls would fare the same.
                raise (EndpointRefused if loop.time() < self._clear_at else CallFailed)(late, outcome.status)
            self.waited += wait
            await asyncio.sleep(wait)

    async def _attempt(
        self, api: Api, body: Mapping[str, Any], parse: Callable[[Any], T], left: float
    ) -> _Usable[T] | Attempt:
        import openai

        timeout = min(self.settings.request_timeout, left)
        try:
            request = self._client.post(PATHS[api], cast_to=object, body=dict(body))
            answer = await asyncio.wait_for(request, timeout)  # the client's timeout is one of each read
            return _Usable(parse(answer))
        except (asyncio.TimeoutError, openai.APITimeoutError):
            return Attempt(f"no answer within {timeout:g} s", billed=True)
        except openai.APIStatusError as error:
            reason = self.redact(f"status {error.status_code}: {_short(_status_message(error))}")
            return Attempt(reason, billed=False, status=error.status_code, wait=retry_after(error.response.headers))
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            # Refused before anything was sent: nobody has been paid.
            unsent = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
            reason = self.redact(f"connection failed: {_short(str(cause) or type(cause).__name__)}")
            return Attempt(reason, billed=not unsent)
        except UnusableAnswer as error:
            return Attempt(self.redact(f"unusable answer: {_short(str(error))}"), billed=True, status=200)
        except (ValueError, openai.APIError) as error:  # not JSON
            return Attempt(self.redact(f"the answer is no JSON: {_short(str(error))}"), billed=True, status=200)

    def _limit(self) -> str:
        return f"total_timeout = {self.settings.total_timeout:g} s"

    def _raise_if_hopeless(self, outcome: Attempt) -> None:
        status = outcome.status
        if status in STOPPING or (status == 429 and "insufficient_quota" in outcome.reason):
            raise EndpointRefused(f"{self.settings.base_url} refuses: {outcome.reason}", status)
        if status is not None and 400 <= status < 500 and status not in RETRIED:
            raise CallFailed(outcome.reason, status)

    def _wait_after(self, attempt: int, outcome: Attempt) -> float:
        ceiling = min(self.settings.max_backoff, self.settings.backoff * 2.0 ** (attempt - 1))
        wait = ceiling * (0.5 + 0.5 * random.random())
        if outcome.status == 429:
            self.refused += 1
        if outcome.wait is None:
            return wait
        if outcome.status in (429, 503):
            # What holds for this request holds for all of ours.
            self._clear_at = max(self._clear_at, asyncio.get_running_loop().time() + outcome.wait)
        # Never earlier than asked; a little later, or all would come back at once.
        return outcome.wait + 0.5 * self.settings.backoff * random.random()

    async def _wait_turn(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        due = self._clear_at
        if self.settings.requests_per_minute is not None:
            due = max(due, self._next_slot, loop.time())
            self._next_slot = due + 60.0 / self.settings.requests_per_minute
        if due > deadline:
            raise EndpointRefused(f"the next request is due in {due - loop.time():.1f} s, beyond {self._limit()}")
        while (delay := max(due, self._clear_at) - loop.time()) > 0:
            self.waited += delay
            await asyncio.sleep(delay)


def _status_message(error: Any) -> str:
    code = f" ({error.code})" if getattr(error, "code", None) else ""
    body = error.body
    message = body.get("message") if isinstance(body, Mapping) else None
    return (str(message) if message else str(error.message)) + code


def _short(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
