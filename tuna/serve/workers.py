"""Threads for slow work outside the model: parsing requests, tokenising, serialising answers.

On the event loop, one client's megabytes would block all others, including health checks.
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
    """Threads with one tokenizer each: a fast tokenizer cannot be set up in one thread and used in another.

    Args:
        tokenizer: copied for each thread.
        max_waiting: maximum number of waiting jobs; more are refused.
        count: number of threads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_waiting: int, count: int = 2) -> None:
        self.max_waiting = max_waiting
        self._places = threading.Semaphore(max_waiting)
        self._tokenizer, self._copying, self._local = tokenizer, threading.Lock(), threading.local()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="tuna-worker")

    async def run(self, function: Callable[[PreTrainedTokenizerBase], T]) -> T:
        """Run `function` with a tokenizer in one of the threads.

        Raises:
            ApiError: too many jobs are waiting (429), or the server is shutting down (503).
        """
        if not self._places.acquire(blocking=False):
            raise ApiError(429, f"{self.max_waiting} requests are already waiting to be parsed", code="queue_full")
        try:
            future = self._pool.submit(lambda: function(self._own()))
        except RuntimeError as error:
            self._places.release()
            raise ApiError(503, "the server is shutting down") from error
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Accept no more jobs; running ones are not interrupted."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _own(self) -> PreTrainedTokenizerBase:
        if not hasattr(self._local, "tokenizer"):
            with self._copying:
                self._local.tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer: PreTrainedTokenizerBase = self._local.tokenizer
        return tokenizer
