"""Launch configurations of kernels: a fixed choice per architecture, or one tuned and cached.

A kernel's file lists a few configurations with their reasons. By default the first one for the present GPU is used.
With `TUNA_KERNELS_AUTOTUNE=1` the first call of a shape times all of them and caches the fastest in
`$XDG_CACHE_HOME/tuna_kernels/autotune.json`, by GPU, Triton version, kernel, dtype and shape. The number of rows is
not part of the key if a row's bits would depend on it.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuna_kernels import user_cache
from tuna_kernels.gpu.availability import is_interpreted
from tuna_kernels.gpu.static_case import Config

INTERPRETER = 0  # stands for a compute capability in the tables of configurations
Table = Mapping[int, tuple[Config, ...]]
ENVIRONMENT_VARIABLE = "TUNA_KERNELS_AUTOTUNE"
CACHE = "autotune"
LOG2_E = math.log2(math.e)  # here, since code that launches kernels must not import triton before it is needed


@dataclass(frozen=True)
class Device:
    """The properties of a GPU on which the choice depends."""

    name: str
    capability: int  # 90 for compute capability 9.0
    num_sms: int  # streaming multiprocessors


_INTERPRETED = Device("interpreter", INTERPRETER, 4)


@functools.cache
def _cuda(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    return Device(facts.name, 10 * facts.major + facts.minor, facts.multi_processor_count)


def device_of(tensor: torch.Tensor) -> Device:
    """The GPU of a tensor; the interpreter counts as a GPU with four multiprocessors."""
    if is_interpreted():
        return _INTERPRETED
    index = tensor.device.index
    return _cuda(torch.cuda.current_device() if index is None else index)


def planned_device() -> Device:
    """The present GPU or, for a plan made without one, an H100."""
    if is_interpreted():
        return _INTERPRETED
    return _cuda(torch.cuda.current_device()) if torch.cuda.is_available() else Device("NVIDIA H100", 90, 132)


def float32_precision(highest: str) -> str:
    """How a kernel multiplies float32: `highest` if `torch.get_float32_matmul_precision` is "highest", else TF32.
    docs/numerics.md says which exact method each kernel uses."""
    return highest if torch.get_float32_matmul_precision() == "highest" else "tf32"


def candidates(table: Table, capability: int) -> tuple[Config, ...]:
    """The configurations of the newest listed architecture that is not newer than this one."""
    known = [c for c in table if c <= capability]
    return table[max(known)] if known else table[min(table)]


def cache_file() -> Path:
    """Where tuned choices are cached."""
    return user_cache.path_of(CACHE)


def _read_cache() -> dict[str, int]:
    content = user_cache.read(CACHE)
    return content if isinstance(content, dict) else {}


def bucket(n: int) -> int:
    """A size rounded up to a power of two: shapes in one bucket share a tuned choice."""
    return 1 << max(0, n - 1).bit_length()


def _milliseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=50, return_mode="median"))


@functools.cache
def _tuned(key: str) -> int | None:
    choice = _read_cache().get(key)
    return choice if isinstance(choice, int) else None


def choose(
    kernel: str, table: Table, device: Device, key: tuple[object, ...], run: Callable[[Config], Any] | None = None
) -> Config:
    """The configuration for a launch.

    Args:
        kernel: name of the kernel, for the cache.
        table: its configurations by compute capability.
        device: the GPU.
        key: what else the best choice depends on: dtypes, bucketed sizes.
        run: launches the kernel with a configuration, without side effects on results; None: never tune.
    """
    configs = candidates(table, device.capability)
    if len(configs) == 1 or run is None or os.environ.get(ENVIRONMENT_VARIABLE, "0") != "1":
        return configs[0]
    import triton

    name = "|".join(str(part) for part in (device.name, triton.__version__, kernel, *key))
    choice = _tuned(name)
    if choice is None or choice >= len(configs):
        times = [_milliseconds(functools.partial(run, config)) for config in configs]
        choice = times.index(min(times))
        user_cache.write(CACHE, _read_cache() | {name: choice})
        _tuned.cache_clear()
    return configs[choice]
