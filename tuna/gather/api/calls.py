"""Paid calls as a pipeline uses them: asked once, written down at once, many side by side.

`PaidCalls.ask` looks into the journal first. `run_jobs` works through a list with bounded concurrency; a job that
fails is set aside, one that is refused (budget spent, key not taken) ends the run without cutting off what is in
flight, for that is paid.
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

DOWN = 25  # jobs failed in a row: the endpoint is down, and the other thousands need not learn it one by one
J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class Request:
    """A request not yet made; fields as the arguments of `PaidCalls.ask`."""

    api: Api
    body: Mapping[str, Any]
    draw: int = 0
    omit: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaidSettings:
    """How to ask and what to spend (`tuna.gather.api.budget.Budget`): all that does not change what an answer means.

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
        """The budget as earlier runs left it."""
        calls, spent = (journal.calls, journal.spent) if journal is not None else (0, None)
        return Budget(self.max_calls, self.max_cost, self.prices, calls=calls, spent=spent)


class Unfinished(Exception):
    """A job that cannot be done, and why; whoever raises it has kept what was paid for."""


class PaidCalls:
    """Calls to one endpoint that are never paid for twice.

    Args:
        endpoint: whom to ask.
        journal: where answers stand.
        budget: what may be spent.

    Attributes:
        found: calls answered by the journal.
        made: calls answered by the endpoint.
        passed_over: answers of the journal that are of no use, and were asked for again.
        closed: nothing is asked any more; what the journal answers is answered.
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
        """The answer to a request, from the journal or else from the endpoint.

        Args:
            api: "completions" or "chat".
            body: the request; it decides the key.
            parse: makes a JSON value of the answer, to be kept, or raises `UnusableAnswer`.
            stored: reads what ``parse`` made out of the journal, or raises `UnusableAnswer`: then it is asked again.
            draw: which draw of the same request this is: a sampled answer may be wanted more than once.
            omit: fields of ``body`` that do not change what is asked for (how to wrap the answer, say).
            probe: the answer says what the endpoint can do, and is no part of a result.

        Raises:
            CallFailed: the call was given up.
            BudgetSpent: it does not fit the budget.
        """
        key = request_key(api, body, draw=draw, omit=omit)
        # Equal requests side by side wait for one answer.
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
                    raise CallFailed("it is not in the journal, and the run has ended")
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
    """What became of a list of jobs.

    Attributes:
        results: by the index of the job.
        failed: reasons, by the index of the job.
        stopped: why the run ended early, None where it did not.
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
    """Work through ``jobs``, at most ``concurrency`` side by side.

    `CallFailed` and `Unfinished` set one job aside. `BudgetSpent`, `EndpointRefused`, the first Ctrl-C, and `DOWN` jobs
    in a row that failed for want of a working endpoint stop the handing out; jobs in flight are finished. Any other
    error is raised at once.

    Raises:
        ValueError: ``concurrency`` below 1.
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
            outcome.stopped = outcome.stopped or CallFailed(f"{DOWN} jobs in a row failed, the last: {error}")

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
    """`run_jobs` with an endpoint, a journal and a budget; ``prepare`` comes before the first job, and alone.

    Where the run ends early, the jobs left that the journal can answer are still done: an earlier run may have paid.
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
    """What requests would take at most: calls to make, calls that the journal answers, tokens of the former."""
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
    """Within, the first Ctrl-C calls ``handler``, and the second is one as ever."""
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
    """What a request is filed under; arguments as of `PaidCalls.ask`."""
    content = {name: value for name, value in body.items() if name not in omit}
    return content_key({"api": api, "body": content, "draw": draw})


def _prompt_tokens(api: Api, body: Mapping[str, Any]) -> int:
    """Tokens of the prompt of a request, estimated without its tokenizer."""
    if api == "completions":
        return estimate_tokens(str(body.get("prompt", "")))
    return sum(4 + estimate_tokens(str(turn.get("content", ""))) for turn in body.get("messages", ()))


def worst_usage(api: Api, body: Mapping[str, Any]) -> Usage:
    """The most tokens that a request can take: every choice of full length."""
    limit = body.get("max_completion_tokens", body.get("max_tokens", 4096))
    return Usage(_prompt_tokens(api, body), int(body.get("n", 1)) * int(limit))


def _used(reply: Any, worst: Usage) -> tuple[int, int]:
    """Tokens as the endpoint reports them, or at their worst where it does not (or not in numbers)."""
    used = reported_usage(reply) or worst
    return used.input, used.output
