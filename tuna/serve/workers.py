"""Threads for what takes time besides the model: reading requests, tokenising, writing answers.

On the event loop one client's megabytes would keep everyone waiting, also those who only ask whether the server
is there.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from tuna.serve.errors import ApiError

__all__ = ["Workers"]

T = TypeVar("T")


class Workers:
    """Some threads, each with a tokenizer of its own: a fast one cannot be set up in one thread and used in another.

    Args:
        tokenizer: what the threads' tokenizers are copies of.
        max_waiting: most jobs that wait; more are refused.
        count: threads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_waiting: int, count: int = 2) -> None:
        self.max_waiting = max_waiting
        self._places = threading.Semaphore(max_waiting)
        self._tokenizer, self._copying, self._local = tokenizer, threading.Lock(), threading.local()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="tuna-worker")

    async def run(self, function: Callable[[PreTrainedTokenizerBase], T]) -> T:
        """What `function` makes of a tokenizer.

        Raises:
            ApiError: too many jobs wait (429), or the server shuts down (503).
        """
        if not self._places.acquire(blocking=False):
            raise ApiError(429, f"{self.max_waiting} requests wait to be read already", code="queue_full")
        try:
            future = self._pool.submit(lambda: function(self._own()))
        except RuntimeError as error:
            self._places.release()
            raise ApiError(503, "the server is shutting down") from error
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Take no more jobs; those that run are left alone."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _own(self) -> PreTrainedTokenizerBase:
        if not hasattr(self._local, "tokenizer"):
            with self._copying:
                self._local.tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer: PreTrainedTokenizerBase = self._local.tokenizer
        return tokenizer
