"""The choice of matrix products in the `cpu` backend: csrc/cpu/head/products.h or the BLAS, whichever is faster.

The instruction set does not decide it: a processor with AMX has units that only a BLAS uses. So both are timed at
first use on a processor, which takes some milliseconds. Bits differ between the two, so the choice is kept in the
user's cache directory and does not change from run to run. If the cache is not writable nothing is timed, and our own
products are used. `TUNA_KERNELS_CPU_PRODUCTS` overrides the choice.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tuna_kernels import user_cache

VARIABLE = "TUNA_KERNELS_CPU_PRODUCTS"
OWN, BLAS = "own", "blas"
WAYS = (OWN, BLAS)

ROUNDS = range(3, 10)
"""Minimum and maximum number of rounds; after `SECONDS` no more are started."""
SECONDS = 0.04
CLEAR = 0.9
"""The BLAS is chosen below this fraction of our time: timings on one machine vary by some percent."""

_measuring = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """`way` is `OWN` or `BLAS`; the times, if measured, are milliseconds for the same products."""

    way: str
    reason: str
    own_ms: float | None = None
    blas_ms: float | None = None


Run = Callable[[], None]


def choose(dtype: torch.dtype, instruction_set: str, own: Callable[[], Run], blas: Callable[[], Run]) -> Choice:
    """The choice for products of this dtype on an instruction set for which we have our own.

    `own` and `blas` prepare the same products and return the function to time.

    Raises:
        ValueError: TUNA_KERNELS_CPU_PRODUCTS is neither "own" nor "blas".
    """
    asked = os.environ.get(VARIABLE)
    if asked is not None:
        if asked not in WAYS:
            raise ValueError(f"{VARIABLE} = {asked!r} is not one of {WAYS}")
        return Choice(asked, f"{VARIABLE} asks for it")
    key = "|".join((_processor(), instruction_set, str(dtype), _precision(), f"torch {torch.__version__}"))
    name = f"cpu_products-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    place = str(user_cache.path_of(name))
    with _measuring:
        if place not in _made:
            _made[place] = _read(user_cache.read(name), key) or _measured(name, key, own, blas)
        return _made[place]


_made: dict[str, Choice] = {}  # by file: constant within a process


def forget() -> None:
    """Forget the choices of this process, but not those cached on disk."""
    _made.clear()


def _read(content: object, key: str) -> Choice | None:
    """The choice written for `key`; None for other content."""
    if not isinstance(content, dict) or content.get("key") != key or content.get("way") not in WAYS:
        return None
    own_ms, blas_ms = content.get("own_ms"), content.get("blas_ms")
    if not isinstance(own_ms, float) or not isinstance(blas_ms, float):
        return None
    return _told(content["way"], own_ms, blas_ms)


def _measured(name: str, key: str, own: Callable[[], Run], blas: Callable[[], Run]) -> Choice:
    if not user_cache.is_writable(name):
        where = user_cache.path_of(name).parent
        return Choice(OWN, f"not timed: {where} is not writable, so the choice could not be cached")
    # In a separate thread, without the caller's fake tensor mode, default device or profiler.
    with ThreadPoolExecutor(1) as thread:
        own_ms, blas_ms = thread.submit(lambda: _times(own(), blas())).result()
    choice = _told(BLAS if blas_ms < CLEAR * own_ms else OWN, own_ms, blas_ms)
    content = {"key": key, "way": choice.way, "own_ms": own_ms, "blas_ms": blas_ms}
    return _read(user_cache.keep_first(name, content, lambda kept: _read(kept, key) is not None), key) or choice


def _told(way: str, own_ms: float, blas_ms: float) -> Choice:
    return Choice(way, f"timed once on this processor: {own_ms:.2f} ms, the BLAS {blas_ms:.2f} ms", own_ms, blas_ms)


def _times(*runs: Run) -> list[float]:
    """Minimum time of each run in milliseconds, over several interleaved rounds."""
    best = [float("inf")] * len(runs)
    for run in runs:
        run()
    begun = time.perf_counter()
    for done in range(ROUNDS.stop):
        if done >= ROUNDS.start and time.perf_counter() - begun > SECONDS:
            break
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def _precision() -> str:
    """The precision of float32 products in the BLAS: at `medium` it may multiply in bfloat16, on AMX if present."""
    return torch.get_float32_matmul_precision()


@functools.cache
def _processor() -> str:
    """The system's name of this processor, with its family, model and stepping if Linux lists them."""
    wanted = ("vendor_id", "model name", "cpu family", "model", "stepping")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        found = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in found.items()}
        parts = [f"{name} {fields[name]}" for name in wanted if name in fields]
    except OSError:
        parts = []
    return ", ".join(parts) or platform.processor() or platform.machine()
