"""Requests to an OpenAI-compatible endpoint, with retries.

What happens after an attempt:

| the endpoint | the client |
|---|---|
| answers with a JSON object that the caller can use | is done |
| 408, 409, 425, 429, 500 and above | waits (Retry-After, or exponential back-off with jitter) and retries |
| breaks the connection, times out, sends no JSON or an unusable object | the same; the call counts as lost |
| sends what a retry would give again at the full price (a withheld text, too large a body) | gives up the call; lost |
| 401, 402, or 429 for an empty account | stops the run: every other call would fail too |
| 403, 404 or a redirect to another host, before it has answered any call | the same |
| requests a wait beyond the total timeout for all calls | the same |
| any other status (400: prompt too long, …) | gives up the call and reports why |

Redirects (307, 308) are followed on the same host and port, or from http to https on the same host at the default
ports: prompts are sent to no other host.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import Any, Generic, TypeVar
from urllib.parse import urljoin, urlsplit

from tuna.gather.api.answers import Api
from tuna.gather.api.bodies import UnusableAnswer, parse_json, read_body, short
from tuna.gather.api.keys import Redactor, api_key
from tuna.gather.api.remedies import error_words, remedy
from tuna.gather.api.settings import EndpointSettings

__all__ = [
    "Api",
    "Attempt",
    "CallFailed",
    "Endpoint",
    "EndpointRefused",
    "UnusableAnswer",
    "api_key",
    "retry_after",
]

T = TypeVar("T")
PATHS: dict[Api, str] = {"completions": "/completions", "chat": "/chat/completions"}
RETRIED = frozenset({408, 409, 425, 429})
STOPPING = frozenset({401, 402})
UNKNOWN_PLACE = frozenset({300, 301, 302, 303, 304, 305, 307, 308, 403, 404})  # address or model, or this call only
MOST_HOPS = 3
MOST_WAIT = 86400.0  # seconds; a Retry-After beyond a day is an error of the endpoint and ignored
MOST_ERROR = 2**16  # bytes read of an error


class CallFailed(Exception):
    """A call was given up; `status` is that of the last answer, None if there was none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EndpointRefused(CallFailed):
    """The endpoint refuses all calls: wrong key, account, address or model."""


@dataclass(frozen=True)
class Attempt:
    """An attempt that ended without a usable answer.

    Attributes:
        reason: why, without secrets.
        billed: whether it was, or may have been, billed.
        status: HTTP status, None without an answer.
        wait: seconds the endpoint requests to wait, None if it does not say.
        again: whether a retry may succeed.
    """

    reason: str
    billed: bool
    status: int | None = None
    wait: float | None = None
    again: bool = True


@dataclass(frozen=True)
class _Usable(Generic[T]):
    value: T  # wrapped, since T may be any type


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds to wait by `retry-after-ms` or `Retry-After` (seconds or an HTTP date); None without one.

    More than a day is considered an error and ignored (None).

    Examples:
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
        if math.isfinite(seconds) and seconds <= MOST_WAIT:
            return max(0.0, seconds)
    return None


class Endpoint:
    """An HTTP client with retries. Use as an asynchronous context manager.

    Args:
        settings: address, timeouts and retries.
        answered: whether it answered an earlier run: then a 404 concerns one record, not the address.

    Attributes:
        requests, retries, refused, waited: requests sent, retries among them, answers of status 429, and
            seconds spent waiting (summed over calls).
        single_choice: whether it was found to refuse more than one choice per request.
    """

    def __init__(self, settings: EndpointSettings, *, answered: bool = False) -> None:
        self.settings = settings
        self.requests, self.retries, self.refused, self.waited = 0, 0, 0, 0.0
        self.single_choice = False
        self._key = api_key(settings.key_variable)
        self._redactor = Redactor(self._key)
        self._answered = answered  # whether any call was answered: then the address is right
        self._clear_at = 0.0  # no request before this (loop time): a Retry-After applies to all
        self._next_slot = 0.0  # of the rate limit

    async def __aenter__(self) -> Endpoint:
        import httpx

        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        headers = {
            "authorization": f"Bearer {self._key}",
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "gzip",  # decompressed by `read_body` with a size limit
            "user-agent": "tuna",
        }
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=self.settings.request_timeout,
            limits=unlimited,
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # no cookies are kept
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    def redact(self, text: str) -> str:
        """`text` without the key."""
        return self._redactor.text(text)

    async def call(
        self,
        api: Api,
        body: Mapping[str, Any],
        parse: Callable[[Any], T],
        *,
        before: Callable[[], Awaitable[None]],
        after: Callable[[Attempt], Awaitable[None]],
    ) -> T:
        """Request until there is a usable answer.

        Args:
            api: "completions" or "chat".
            body: the request.
            parse: converts the answer (a JSON value) to the result, also JSON, or raises `UnusableAnswer`. The key
                is removed from its texts.
            before: awaited before each attempt (a budget may refuse it by raising).
            after: awaited after each attempt without a usable answer.

        Raises:
            CallFailed: given up, with the reason of the last attempt; `EndpointRefused` if every call would fail.
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
                raise CallFailed(f"given up after {attempt} attempts; the last: {outcome.reason}", outcome.status)
            wait = self._wait_after(attempt, outcome)
            if loop.time() + wait > deadline:
                late = f"{outcome.reason}; the next attempt is due in {wait:.1f} s, beyond {self._limit()}"
                # The requested wait applies to all calls, so the others would fail too.
                raise (EndpointRefused if loop.time() < self._clear_at else CallFailed)(late, outcome.status)
            self.waited += wait
            await asyncio.sleep(wait)

    async def _attempt(
        self, api: Api, body: Mapping[str, Any], parse: Callable[[Any], T], left: float
    ) -> _Usable[T] | Attempt:
        import httpx

        timeout = min(self.settings.request_timeout, left)
        url = self.settings.base_url + PATHS[api]
        content = json.dumps(dict(body), allow_nan=False).encode()
        try:
            # The HTTP client's own timeout is per read.
            answer = await asyncio.wait_for(self._post(url, content), timeout)
            if isinstance(answer, Attempt):
                return answer
            value = self._redactor.value(parse(parse_json(answer)))
        except asyncio.TimeoutError:
            return Attempt(f"no answer within {timeout:g} s", billed=True)
        except UnusableAnswer as error:
            return Attempt(self._said(f"unusable answer: {error}"), billed=True, status=200, again=error.again)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # Refused before anything was sent: not billed.
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.InvalidURL)
            reason = f"connection failed: {str(error) or type(error).__name__}"
            return Attempt(self._said(reason + (f" (at {url})" if unsent else "")), billed=not unsent)
        self._answered = True
        return _Usable(value)

    async def _post(self, url: str, content: bytes) -> bytes | Attempt:
        """The body of an answer of status 2xx, or the failed attempt."""
        for _ in range(MOST_HOPS + 1):
            async with self._client.stream("POST", url, content=content) as response:
                status = response.status_code
                if 200 <= status < 300:
                    return await read_body(response.aiter_raw(), response.headers.get("content-encoding", ""))
                if not 300 <= status < 400:
                    words = await self._error(response.aiter_raw(), response.headers.get("content-encoding", ""))
                    reason = self._said(f"status {status}: {words}", remedy(status, words, url, self.settings))
                    return Attempt(reason, billed=False, status=status, wait=retry_after(response.headers))
                target = response.headers.get("location", "")
            there = _same_host(url, target) if status in (307, 308) else None
            if there is None:
                where = f" to {target}" if target else ""
                advice = (
                    "It was not followed, because prompts are sent to the host of base_url only"
                    if _same_host(url, target) is None
                    else "Such a redirect would lose the prompt: set --base-url to the address it leads to"
                )
                return Attempt(
                    self._said(f"status {status}: {url} redirects{where}", advice), False, status, again=False
                )
            url = there
        return Attempt(self._said(f"status {status}: {url} redirects in circles"), False, status, again=False)

    async def _error(self, chunks: Any, encoding: str) -> str:
        try:
            return error_words(await read_body(chunks, encoding, MOST_ERROR))
        except UnusableAnswer as error:
            return f"the text of the error cannot be read: {error}"

    def _said(self, words: str, advice: str = "") -> str:
        """Text that may come from the endpoint, made safe for printing and recording."""
        words = short(self.redact(words))
        return f"{words.rstrip('.')}. {advice}" if advice else words

    def _limit(self) -> str:
        return f"total_timeout = {self.settings.total_timeout:g} s"

    def _raise_if_hopeless(self, outcome: Attempt) -> None:
        status = outcome.status
        refused = status in STOPPING or (status == 429 and "insufficient_quota" in outcome.reason)
        if refused or (status in UNKNOWN_PLACE and not self._answered):
            raise EndpointRefused(f"{self.settings.base_url} refuses: {outcome.reason}", status)
        if not outcome.again or (status is not None and 300 <= status < 500 and status not in RETRIED):
            raise CallFailed(outcome.reason, status)

    def _wait_after(self, attempt: int, outcome: Attempt) -> float:
        ceiling = min(self.settings.max_backoff, self.settings.backoff * 2.0 ** (attempt - 1))
        wait = ceiling * (0.5 + 0.5 * random.random())
        if outcome.status == 429:
            self.refused += 1
        if outcome.wait is None:
            return wait
        if outcome.status in (429, 503):
            # Applies to all requests.
            self._clear_at = max(self._clear_at, asyncio.get_running_loop().time() + outcome.wait)
        # Never earlier than requested; a little later, so that not all return at once.
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


def _same_host(url: str, target: str) -> str | None:
    """The target of a redirect if it has the same host and port, or adds TLS on the same host; else None."""
    try:
        there = urljoin(url, target)
        one, other = urlsplit(url), urlsplit(there)
        same = (one.scheme, one.hostname, one.port) == (other.scheme, other.hostname, other.port)
        safer = one.hostname == other.hostname and (one.scheme, other.scheme) == ("http", "https")
        plain = one.port in (None, 80) and other.port in (None, 443)
    except ValueError:
        return None
    return there if target and not other.username and (same or (safer and plain)) else None
