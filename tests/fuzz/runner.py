"""Finds the fuzzers of this package and runs their cases in a process of their own, so that one that crashes or hangs
is a failure like any other."""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

CASE_SECONDS = 120.0
"""A case that takes longer hangs."""
DEFAULT_SHORT_RUN = 10


def fuzzers() -> dict[str, str]:
    """Name and first line of the docstring of every fuzzer."""
    import tests.fuzz as package

    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_") or module.name == "runner":
            continue
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        if hasattr(loaded, "case"):
            found[module.name] = (loaded.__doc__ or "").strip().splitlines()[0]
    return found


def case_of(name: str) -> Callable[[int], None]:
    """The function of a fuzzer that runs the case of a seed."""
    case: Callable[[int], None] = importlib.import_module(f"tests.fuzz.{name}").case
    return case


def short_run(name: str) -> int:
    """How many cases of a fuzzer the test suite runs."""
    return int(getattr(importlib.import_module(f"tests.fuzz.{name}"), "SHORT_RUN", DEFAULT_SHORT_RUN))


@dataclass
class Tally:
    """What a run of one fuzzer came to."""

    name: str
    cases: int = 0
    seconds: float = 0.0
    failed_seeds: list[int] = field(default_factory=list)


def run(
    names: Iterable[str],
    *,
    seed: int,
    seconds: float,
    cases: int | None = None,
    report: Callable[[str, int, str], None],
    case_seconds: float = CASE_SECONDS,
) -> list[Tally]:
    """Run cases of seeds ``seed, seed + 1, …`` of each fuzzer, all of them for about the same time.

    Args:
        names: fuzzers.
        seed: of the first case of each.
        seconds: when to stop; a case that has begun is finished.
        cases: at most so many of each fuzzer; None: as many as there is time for.
        report: called with fuzzer, seed and what was wrong, for each failure.
        case_seconds: how long one case may take.
    """
    tallies = [Tally(name) for name in names]
    end = time.monotonic() + seconds
    worker = _Worker()
    try:
        while time.monotonic() < end:
            open_ = [t for t in tallies if cases is None or t.cases < cases]
            if not open_:
                break
            tally = min(open_, key=lambda t: t.seconds)
            now, of_case = time.monotonic(), seed + tally.cases
            fault = worker.run(tally.name, of_case, case_seconds)
            tally.seconds += time.monotonic() - now
            tally.cases += 1
            if fault:
                tally.failed_seeds.append(of_case)
                report(tally.name, of_case, fault)
    finally:
        worker.close()
    return tallies


class _Worker:
    """A process that runs one case at a time; another takes its place when it dies."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._line: Connection | None = None

    def run(self, name: str, seed: int, limit: float) -> str:
        """What was wrong with the case, "" if nothing."""
        line = self._start()
        line.send((name, seed))
        try:
            if line.poll(limit):
                answer: str = line.recv()
                return answer
        except (EOFError, ConnectionResetError):
            return self._buried()
        self.close()
        return f"no end after {limit:g} s"

    def _start(self) -> Connection:
        if self._line is None:
            context = multiprocessing.get_context("spawn")
            self._line, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()
        return self._line

    def _buried(self) -> str:
        process, self._process, self._line = self._process, None, None
        assert process is not None
        process.join()
        code = process.exitcode or 0
        return f"the process ended with {signal.Signals(-code).name if code < 0 else f'code {code}'}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._line = None


def _serve(line: Connection) -> None:
    while True:
        try:
            name, seed = line.recv()
        except EOFError:  # whoever asked is gone
            return
        line.send(outcome(name, seed))


def outcome(name: str, seed: int) -> str:
    """Run one case here: what was wrong with it, "" if nothing."""
    try:
        case_of(name)(seed)
    except AssertionError as error:
        return str(error) or traceback.format_exc(limit=-3)
    except Exception:
        return traceback.format_exc(limit=-6)
    return ""
