"""The thread that runs the model: requests wait in a queue and are processed in batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuna.models.decoding import Row, generate

__all__ = ["Busy", "Engine", "RowTask"]

T = TypeVar("T")


class Busy(RuntimeError):
    """The engine cannot do this: its queue is full, it is shutting down, or the caller has cancelled."""


@dataclass
class RowTask:
    """A row submitted to the engine.

    Attributes:
        row: the answer to sample; written by the engine's thread until `done`.
        on_token: called on the engine's thread after each token.
        done: resolves to the row when it is finished.
    """

    row: Row
    on_token: Callable[[Row], None] | None = None
    done: Future[Row] = field(default_factory=Future)
    cancelled: bool = False


@dataclass
class _Call:
    function: Callable[[], Any]
    done: Future[Any]


class Engine:
    """Runs a model for many callers.

    Waiting rows are batched in order of arrival, within `max_rows` and with the padded cache within `max_tokens`; the
    next batch starts when the last row of the current one has ended (a row that ends early is answered immediately). A
    single row always runs. Other work on the model waits in the same queue.

    Args:
        model, tokenizer: the model to run; nothing else may run it at the same time.
        max_rows: maximum rows per batch. With 1, a seed gives bit-identical results under any load.
        max_tokens: maximum of rows times (longest prompt + longest answer) per batch: the memory of the cache.
        max_waiting: maximum number of waiting rows and calls; more are refused.
        linger: seconds an idle engine waits for further requests after the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 16,
        max_tokens: int = 32768,
        max_waiting: int = 1024,
        linger: float = 0.005,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens), ("max_waiting", max_waiting)):
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        self.model, self.tokenizer = model, tokenizer
        torch.nn.Module.eval(model)
        self.max_rows, self.max_tokens, self.max_waiting, self.linger = max_rows, max_tokens, max_waiting, linger
        self.batches = 0  # generation batches run so far
        self._waiting: deque[RowTask | _Call] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="tuna-engine", daemon=True)
        self._thread.start()

    def submit(self, tasks: list[RowTask]) -> None:
        """Queue all of the rows or none.

        Raises:
            Busy: the queue is full.
        """
        self._put(list(tasks))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Queue other work on the model.

        Raises:
            Busy: the queue is full.
        """
        done: Future[T] = Future()
        self._put([_Call(function, done)])
        return done

    def close(self, timeout: float | None = None) -> bool:
        """Cancel waiting and running work, and end the thread after its current step.

        Returns:
            Whether the thread ended within `timeout` seconds (None: no limit).
        """
        with self._changed:
            self._stopped = True
            for item in self._waiting:
                item.done.cancel()
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _put(self, items: list[Any]) -> None:
        with self._changed:
            if self._stopped:
                raise Busy("the server is shutting down")
            if len(self._waiting) + len(items) > self.max_waiting:
                raise Busy(f"{len(self._waiting)} answers are already waiting, the limit is {self.max_waiting}")
            self._waiting.extend(items)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                idle = not self._waiting
                while not self._waiting and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
            if idle and self.linger:
                time.sleep(self.linger)
            with self._changed:
                taken = self._take()
            if isinstance(taken, _Call):
                _resolve(taken.done, taken.function)
            elif taken:
                self._run(taken)

    def _take(self) -> list[RowTask] | _Call:
        """The next work: one call, or as many rows as fit; called with the lock held."""
        batch: list[RowTask] = []
        longest = answer = 0
        while self._waiting:
            item = self._waiting[0]
            if isinstance(item, _Call):
                return batch or self._waiting.popleft()  # type: ignore[return-value]
            if item.cancelled or item.done.cancelled():
                self._waiting.popleft()
                item.done.cancel()
                continue
            longest = max(longest, len(item.row.prompt))
            answer = max(answer, item.row.sampling.max_tokens)
            fits = len(batch) < self.max_rows and (len(batch) + 1) * (longest + answer) <= self.max_tokens
            if batch and not fits:
                break
            self._waiting.popleft()
            # From here on only this thread ends it: a caller that gives up sets `cancelled`.
            if item.done.set_running_or_notify_cancel():
                batch.append(item)
        return batch

    def _run(self, batch: list[RowTask]) -> None:
        self.batches += 1
        by_row = {id(task.row): task for task in batch}

        def on_token(row: Row) -> bool:
            task = by_row[id(row)]
            if task.on_token is not None:
                task.on_token(row)
            if row.finish_reason is not None:
                task.done.set_result(row)
            return not (task.cancelled or self._stopped)

        try:
            generate(self.model, self.tokenizer, [task.row for task in batch], on_token)
        except Exception as error:  # any error must reach the callers, and the thread must continue
            for task in batch:
                if not task.done.done():
                    task.done.set_exception(error)
        for task in batch:
            if not task.done.done():
                task.done.set_exception(Busy("the server is shutting down" if self._stopped else "cancelled"))


def _resolve(done: Future[Any], function: Callable[[], Any]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(function())
    except Exception as error:  # passed to the caller
        done.set_exception(error)
