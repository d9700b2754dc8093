"""Paid calls for pipelines: each made once, recorded immediately, many in parallel.

`PaidCalls.ask` looks in the journal first. `run_jobs` processes a list with bounded concurrency; a failed job is set
aside; a refusal (budget spent, key rejected) ends the run after the calls in flight, which are paid, have finished.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tuna.gather.api.answers import reported_usage
from tuna.gather.api.budget import Budget, BudgetSpent, Prices, Usage, estimate_tokens
from tuna.gather.api.endpoint import (
    UNKNOWN_PLACE,
    Api,
    Attempt,
    CallFailed,
    Endpoint,
    EndpointRefused,
    UnusableAnswer,
)
from tuna.gather.api.journal import Journal, content_key
from tuna.gather.api.settings import EndpointSettings

__all__ = [
    "Outcome",
    "PaidCalls",
    "PaidSettings",
    "Request",
    "Unfinished",
    "request_key",
    "run_jobs",
    "run_paid",
    "worst_case",
    "worst_usage",
]

DOWN = 25  # failed jobs in a row after which the endpoint is considered down and the run ends
J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class Request:
    """A request to be made; fields are the arguments of `PaidCalls.ask`."""

    api: Api
    body: Mapping[str, Any]
    draw: int = 0
    omit: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaidSettings:
    """Endpoint and budget (`tuna.gather.api.budget.Budget`): the settings that do not change the meaning of an answer.

    Raises:
        ValueError: a value outside its range, or `max_cost` without a price.
    """

    endpoint: EndpointSettings
    concurrency: int = field(default=8, metadata={"help": "Maximum number of concurrent calls."})
    max_calls: int | None = field(
        default=None, metadata={"help": "Maximum number of calls for this folder, over all runs."}
    )
    max_cost: float | None = field(
        default=None, metadata={"help": "Maximum cost for this folder, over all runs; needs the prices."}
    )
    prices: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency = {self.concurrency} must be at least 1")
        self.budget()

    def budget(self, journal: Journal | None = None) -> Budget:
        """The budget remaining from earlier runs."""
        calls, spent = (journal.calls, journal.spent) if journal is not None else (0, None)
        return Budget(self.max_calls, self.max_cost, self.prices, calls=calls, spent=spent)


class Unfinished(Exception):
    """A job cannot be done; raised after everything paid for has been recorded."""


class PaidCalls:
    """Calls to one endpoint that are never paid for twice.

    Args:
        endpoint: the endpoint.
        journal: the journal of answers.
        budget: the budget.

    Attributes:
        found: calls answered from the journal.
        made: calls answered by the endpoint.
        passed_over: unusable answers in the journal, which were requested again.
        closed: no more requests are sent; only the journal answers.
    """

    def __init__(self, endpoint: Endpoint, journal: Journal, budget: Budget) -> None:
        self.endpoint, self.journal, self.budget = endpoint, journal, budget
        self.found = self.made = self.passed_over = 0
        self.closed = False
        self._asking: dict[str, asyncio.Lock] = {}

    async def ask(
        self,
        api: Api,
        body: Mapping[str, Any],
        parse: Callable[[Any], Any],
        *,
        stored: Callable[[Any], Any] = lambda answer: answer,
        draw: int = 0,
        omit: Sequence[str] = (),
        probe: bool = False,
    ) -> Any:
        """The answer to a request, from the journal or from the endpoint.

        Args:
            api: "completions" or "chat".
            body: the request; it determines the key.
            parse: converts the answer to a JSON value for the journal, or raises `UnusableAnswer`.
            stored: reads the value of `parse` from the journal, or raises `UnusableAnswer` to request it again.
            draw: index of the sample, if the same request is made several times.
            omit: fields of `body` that do not affect the content of the answer (for example its format).
            probe: the answer only tests the endpoint and is not part of a result.

        Raises:
            CallFailed: the call was given up.
            BudgetSpent: it exceeds the budget.
        """
        key = request_key(api, body, draw=draw, omit=omit)
        # Equal concurrent requests wait for one answer.
        async with self._asking.setdefault(key, asyncio.Lock()):
            try:
                answer = self.journal.get(key)
                if answer is not None:
                    try:
                        answer = stored(answer)
                    except UnusableAnswer:
                        self.passed_over += 1
                    else:
                        self.found += 1
                        return answer
                if self.closed:
                    raise CallFailed("not in the journal, and the run has ended")
                return await self._pay(key, api, body, parse, probe)
            finally:
                self._asking.pop(key, None)

    async def _pay(self, key: str, api: Api, body: Mapping[str, Any], parse: Callable[[Any], Any], probe: bool) -> Any:
        worst, reserved = worst_usage(api, body), False

        async def before() -> None:
            nonlocal reserved
            await self.budget.reserve(worst)
            reserved = True

        async def after(attempt: Attempt) -> None:
            settle(worst if attempt.billed else None)
            if attempt.billed:
                await self.journal.add_lost(key, attempt.reason, worst)

        def settle(used: Usage | None) -> None:
            nonlocal reserved
            if reserved:
                self.budget.settle(worst, used)
                reserved = False

        try:
            answer, counts = await self.endpoint.call(
                api, body, lambda reply: (parse(reply), _used(reply, worst)), before=before, after=after
            )
            used = Usage(*counts)
            settle(used)
        finally:
            settle(worst)  # cancelled in flight: it may be billed
        await self.journal.add(key, answer, used, probe=probe)
        self.made += 1
        return answer


@dataclass
class Outcome(Generic[R]):
    """The outcome of a list of jobs.

    Attributes:
        results: results by job index.
        failed: reasons by job index.
        stopped: why the run ended early, None if it did not.
    """

    results: dict[int, R] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    stopped: BaseException | None = None


async def run_jobs(
    jobs: Sequence[J],
    work: Callable[[J], Awaitable[R]],
    *,
    concurrency: int,
    on_done: Callable[[], None] = lambda: None,
) -> Outcome[R]:
    """Process `jobs`, at most `concurrency` in parallel.

    `CallFailed` and `Unfinished` set one job aside. After `BudgetSpent`, `EndpointRefused`, the first Ctrl-C, or `DOWN`
    jobs in a row that failed because the endpoint did not work, no more jobs are started; jobs in flight are finished.
    Any other error is raised immediately.

    Raises:
        ValueError: `concurrency` below 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency = {concurrency} must be at least 1")
    outcome: Outcome[R] = Outcome()
    queue, in_a_row = iter(enumerate(jobs)), 0

    def interrupt() -> None:
        outcome.stopped = outcome.stopped or KeyboardInterrupt("interrupted")

    def no_endpoint(error: Exception | None) -> None:
        nonlocal in_a_row
        down = isinstance(error, CallFailed) and (
            error.status is None or error.status >= 500 or error.status in UNKNOWN_PLACE
        )
        in_a_row = in_a_row + 1 if down else 0
        if in_a_row >= DOWN:
            outcome.stopped = outcome.stopped or CallFailed(f"{DOWN} jobs in a row failed; the last: {error}")

    async def worker() -> None:
        for index, job in queue:
            if outcome.stopped is not None:
                return
            try:
                outcome.results[index] = await work(job)
            except (BudgetSpent, EndpointRefused) as error:
                outcome.stopped = outcome.stopped or error
                return
            except (CallFailed, Unfinished) as error:
                outcome.failed[index] = str(error)
                no_endpoint(error)
            else:
                no_endpoint(None)
            on_done()

    with _first_interrupt(interrupt):
        workers = [asyncio.ensure_future(worker()) for _ in range(min(concurrency, len(jobs)))]
        try:
            await asyncio.gather(*workers)
        except BaseException:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            raise
    return outcome


async def run_paid(
    journal: Journal,
    settings: PaidSettings,
    jobs: Sequence[J],
    work: Callable[[PaidCalls, J], Awaitable[R]],
    *,
    prepare: Callable[[PaidCalls], Awaitable[None]] | None = None,
    on_done: Callable[[PaidCalls], None] = lambda calls: None,
) -> tuple[Outcome[R], PaidCalls]:
    """`run_jobs` with an endpoint, a journal and a budget; `prepare` runs alone before the first job.

    If the run ends early, remaining jobs that the journal can answer are still done: an earlier run may have paid.
    """
    budget = settings.budget(journal)
    async with Endpoint(settings.endpoint, answered=len(journal) > 0) as endpoint:
        calls = PaidCalls(endpoint, journal, budget)
        try:
            if prepare is not None:
                await prepare(calls)
        except (BudgetSpent, CallFailed) as error:
            return Outcome(stopped=error), calls
        outcome = await run_jobs(
            jobs, lambda job: work(calls, job), concurrency=settings.concurrency, on_done=lambda: on_done(calls)
        )
        if outcome.stopped is not None:
            calls.closed = True
            for index in set(range(len(jobs))) - outcome.results.keys() - outcome.failed.keys():
                with suppress(CallFailed, Unfinished):
                    outcome.results[index] = await work(calls, jobs[index])
        return outcome, calls


def worst_case(requests: Iterable[Request], journal: Journal | None = None) -> tuple[int, int, Usage]:
    """Upper bounds for requests: calls to make, calls answered from the journal, tokens of the calls to make."""
    made, found, usage = set(), 0, Usage(0, 0)
    for request in requests:
        key = request_key(request.api, request.body, draw=request.draw, omit=request.omit)
        if journal is not None and key in journal:
            found += 1
        elif key not in made:
            made.add(key)
            usage = usage + worst_usage(request.api, request.body)
    return len(made), found, usage


@contextmanager
def _first_interrupt(handler: Callable[[], None]) -> Iterator[None]:
    """A context in which the first Ctrl-C calls `handler` and the second interrupts as usual."""
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        handler()

    loop.add_signal_handler(signal.SIGINT, first)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def request_key(api: Api, body: Mapping[str, Any], *, draw: int = 0, omit: Sequence[str] = ()) -> str:
    """The journal key of a request; arguments as in `PaidCalls.ask`."""
    content = {name: value for name, value in body.items() if name not in omit}
    return content_key({"api": api, "body": content, "draw": draw})


def _prompt_tokens(api: Api, body: Mapping[str, Any]) -> int:
    """Estimated tokens of the prompt of a request, without a tokenizer."""
    if api == "completions":
        return estimate_tokens(str(body.get("prompt", "")))
    return sum(4 + estimate_tokens(str(turn.get("content", ""))) for turn in body.get("messages", ()))


def worst_usage(api: Api, body: Mapping[str, Any]) -> Usage:
    """Maximum usage of a request: every choice of full length."""
    limit = body.get("max_completion_tokens", body.get("max_tokens", 4096))
    return Usage(_prompt_tokens(api, body), int(body.get("n", 1)) * int(limit))


def _used(reply: Any, worst: Usage) -> tuple[int, int]:
    """Tokens as reported by the endpoint, or the worst case if it does not report valid numbers."""
    used = reported_usage(reply) or worst
    return used.input, used.output
