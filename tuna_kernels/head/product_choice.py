"""Whose matrix products the `cpu` backend takes: those of csrc/cpu/head/products.h or the BLAS's, the quicker here.

The instruction set does not tell which: a processor with AMX has units that only a BLAS uses. So both are timed, at the
first use on a processor, in some milliseconds. Bits differ between the two, so the choice is remembered in the user's
cache directory, where it cannot change from run to run; where nothing can be remembered nothing is timed, and the
products are our own. `TUNA_KERNELS_CPU_PRODUCTS` overrides.
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
"""At least, and at most: no more are begun after `SECONDS`."""
SECONDS = 0.04
CLEAR = 0.9
"""Part of our time that the BLAS must do with to be taken: timings of one machine differ by some percent."""

_measuring = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """`way` is `OWN` or `BLAS`; times of the same products in milliseconds where they were measured."""

    way: str
    reason: str
    own_ms: float | None = None
    blas_ms: float | None = None


Run = Callable[[], None]


def choose(dtype: torch.dtype, instruction_set: str, own: Callable[[], Run], blas: Callable[[], Run]) -> Choice:
    """The way for products of this type on an instruction set that has some of our own.

    `own` and `blas` prepare the same products and give what computes them, for the time they take.

    Raises:
        ValueError: TUNA_KERNELS_CPU_PRODUCTS is neither.
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


_made: dict[str, Choice] = {}  # by file: a process does not change its mind


def forget() -> None:
    """What this process chose; not what is remembered on the disk."""
    _made.clear()


def _read(content: object, key: str) -> Choice | None:
    """A choice that was written for `key`; None for anything else."""
    if not isinstance(content, dict) or content.get("key") != key or content.get("way") not in WAYS:
        return None
    own_ms, blas_ms = content.get("own_ms"), content.get("blas_ms")
    if not isinstance(own_ms, float) or not isinstance(blas_ms, float):
        return None
    return _told(content["way"], own_ms, blas_ms)


def _measured(name: str, key: str, own: Callable[[], Run], blas: Callable[[], Run]) -> Choice:
    if not user_cache.is_writable(name):
        where = user_cache.path_of(name).parent
        return Choice(OWN, f"not timed: {where} cannot be written, so that the choice would not be remembered")
    # In a thread of its own, which has no fake tensors, other default device or profiler of the caller's.
    with ThreadPoolExecutor(1) as thread:
        own_ms, blas_ms = thread.submit(lambda: _times(own(), blas())).result()
    choice = _told(BLAS if blas_ms < CLEAR * own_ms else OWN, own_ms, blas_ms)
    content = {"key": key, "way": choice.way, "own_ms": own_ms, "blas_ms": blas_ms}
    return _read(user_cache.keep_first(name, content, lambda kept: _read(kept, key) is not None), key) or choice


def _told(way: str, own_ms: float, blas_ms: float) -> Choice:
    return Choice(way, f"timed once on this processor: {own_ms:.2f} ms, the BLAS {blas_ms:.2f} ms", own_ms, blas_ms)


def _times(*runs: Run) -> list[float]:
    """Milliseconds of each, the least of some rounds that take turns."""
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
    """What the BLAS may do with float32: from `medium` on it may multiply in bfloat16, on AMX where there is some."""
    return torch.get_float32_matmul_precision()


@functools.cache
def _processor() -> str:
    """What the system calls this processor, with its family, model and stepping where Linux lists them."""
    wanted = ("vendor_id", "model name", "cpu family", "model", "stepping")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        found = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in found.items()}
        parts = [f"{name} {fields[name]}" for name in wanted if name in fields]
    except OSError:
        parts = []
    return ", ".join(parts) or platform.processor() or platform.machine()
