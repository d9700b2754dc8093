"""Stopping on a signal: at the end of the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from tuna.train.distributed import launched

__all__ = ["StopSignals", "Stopped"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher forwards a signal that its ranks also get from the terminal or the scheduler: one request, two signals.
ECHO = 5.0  # seconds


class Stopped(KeyboardInterrupt):
    """A run was ended early by a signal."""


class StopSignals:
    """A context in which SIGTERM (a scheduler's pre-emption) and SIGINT (Ctrl-C) request a stop; a second ends at once.

    Attributes:
        received: the name of the signal received, None before.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            # An ignored signal stays ignored: Ctrl-C in a script must not stop its background jobs.
            mine = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in mine}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        rank, ranks = launched()
        if self.received is not None:
            if ranks > 1 and time.monotonic() - self._since < ECHO:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received, self._since = signal.Signals(number).name, time.monotonic()
        if ranks == 1:  # the next signal ends the process, even during a long call
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)
        if rank == 0:
            text = f"{self.received}: stopping after this step, with a checkpoint; repeat to stop at once"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())
