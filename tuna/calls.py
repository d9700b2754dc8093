"""Paid calls as a pipeline uses them: asked once, written down at once, many side by side.

`PaidCalls.ask` looks into the journal first. `run_jobs` works through a list with bounded concurrency; a job that
fails is set aside, one that is refused (budget spent, key not taken) ends the run without cutting off what is in
flight, for that is paid.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tuna.budget import Budget, BudgetSpent, Usage, estimate_tokens
from tuna.endpoint import Api, Attempt, CallFailed, Endpoint, EndpointRefused
from tuna.journal import Journal, content_key

__all__ = ["Outcome", "PaidCalls", "Unfinished", "prompt_tokens", "run_jobs", "worst_usage"]

J = TypeVar("J")
R = TypeVar("R")


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
    """

    def __init__(self, endpoint: Endpoint, journal: Journal, budget: Budget) -> None:
        self.endpoint, self.journal, self.budget = endpoint, journal, budget
        self.found = self.made = 0
        self._asking: dict[str, asyncio.Lock] = {}

    async def ask(
        self,
        api: Api,
        body: Mapping[str, Any],
        parse: Callable[[Any], Any],
        *,
        draw: int = 0,
        omit: Sequence[str] = (),
    ) -> Any:
        """The answer to a request, from the journal or else from the endpoint.

        Args:
            api: "completions" or "chat".
            body: the request; it decides the key.
            parse: makes a JSON value of the answer, to be kept, or raises `UnusableAnswer`.
            draw: which draw of the same request this is: a sampled answer may be wanted more than once.
            omit: fields of ``body`` that do not change what is asked for (how to wrap the answer, say).

        Raises:
            CallFailed: the call was given up.
            BudgetSpent: it does not fit the budget.
        """
        content = {name: value for name, value in body.items() if name not in omit}
        key = content_key({"api": api, "body": content, "draw": draw})
        # Equal requests side by side wait for one answer.
        async with self._asking.setdefault(key, asyncio.Lock()):
            try:
                answer = self.journal.get(key)
                if answer is None:
                    return await self._pay(key, api, body, parse)
                self.found += 1
                return answer
            finally:
                self._asking.pop(key, None)

    async def _pay(self, key: str, api: Api, body: Mapping[str, Any], parse: Callable[[Any], Any]) -> Any:
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
            answer, used = await self.endpoint.call(
                api, body, lambda reply: (parse(reply), _reported(reply) or worst), before=before, after=after
            )
            settle(used)
        finally:
            settle(worst)  # cancelled in flight: it may be billed
        await self.journal.add(key, answer, used)
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

    `CallFailed` and `Unfinished` set one job aside. `BudgetSpent`, `EndpointRefused` and the first Ctrl-C stop the
    handing out; jobs in flight are finished. Any other error is raised at once.

    Raises:
        ValueError: ``concurrency`` below 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency = {concurrency} must be at least 1")
    outcome: Outcome[R] = Outcome()
    queue = iter(enumerate(jobs))

    def interrupt() -> None:
        outcome.stopped = outcome.stopped or KeyboardInterrupt("interrupted")

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


def prompt_tokens(api: Api, body: Mapping[str, Any]) -> int:
    """Tokens of the prompt of a request, estimated without its tokenizer."""
    if api == "completions":
        return estimate_tokens(str(body.get("prompt", "")))
    return sum(4 + estimate_tokens(str(turn.get("content", ""))) for turn in body.get("messages", ()))


def worst_usage(api: Api, body: Mapping[str, Any]) -> Usage:
    """The most tokens that a request can take: every choice of full length."""
    limit = body.get("max_completion_tokens", body.get("max_tokens", 16))
    return Usage(prompt_tokens(api, body), int(body.get("n", 1)) * int(limit))


def _reported(reply: Any) -> Usage | None:
    """Tokens as the endpoint reports them, None where it does not."""
    usage = reply.get("usage") if isinstance(reply, Mapping) else None
    if not isinstance(usage, Mapping):
        return None
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens", 0)]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts):
        return None
    return Usage(*counts)
