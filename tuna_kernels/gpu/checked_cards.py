"""The kinds of card on which `tuna_kernels.self_check` passed, cached between processes."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings

import torch

from tuna_kernels import user_cache

CACHE = "self_check"


def passed(device: torch.device, backend: str = "triton") -> bool:
    """Whether all checks have passed on this kind of card with these versions."""
    return _key(device, backend) in _read()


def warn_if_unchecked(device: torch.device, backend: str = "triton") -> None:
    """Warn, once per process and kind of card, if the kernels have not been checked on it."""
    _warn_once(_key(device, backend))


@functools.cache
def _warn_once(key: str) -> None:
    if key not in _read():
        warnings.warn(
            f"the GPU kernels have not been checked on this card ({key}): run `tuna info --self-check` (a minute)",
            stacklevel=4,
        )


def _key(device: torch.device, backend: str) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}, {backend} {triton.__version__}, torch {torch.__version__}, tuna-kernels {_version()}"


def _version() -> str:
    try:
        return importlib.metadata.version("tuna-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read() -> list[str]:
    content = user_cache.read(CACHE)
    return content if isinstance(content, list) else []


def remember(device: torch.device, backend: str) -> None:
    """Record that all checks of a backend's kernels passed on this kind of card."""
    user_cache.write(CACHE, sorted({*_read(), _key(device, backend)}))
