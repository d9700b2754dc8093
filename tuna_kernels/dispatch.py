"""Which backend computes: what is usable here, why another is not, and what ``auto`` chooses."""

from __future__ import annotations

import os
import platform

import torch

from tuna_kernels.errors import CannotServe
from tuna_kernels.gpu import availability
from tuna_kernels.head import cpu as _cpu_backend
from tuna_kernels.head.backend import HeadBackend, tiled_backend
from tuna_kernels.head.torch import TorchTileOps
from tuna_kernels.head.triton import slabs
from tuna_kernels.installation import warn_of_shadowing

BACKENDS = ("reference", "torch", "cpu", "triton")
ENVIRONMENT_VARIABLE = "TUNA_KERNELS_BACKEND"


def available_backends() -> dict[str, str]:
    """Every backend and the reason why it cannot be used here; an empty reason means it can.

    >>> available_backends()["reference"]
    ''
    """
    return {"reference": "", "torch": "", "cpu": _cpu_backend.WHY_NOT, "triton": availability.why_not()}


def why_not(backend: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """ "" if ``backend`` serves these inputs, else the reason why not."""
    if backend == "triton":
        return availability.supports(device, *dtypes)
    if backend != "cpu":
        return ""
    if device.type != "cpu":
        return f"it computes on CPU tensors, the inputs are on {device}"
    return _cpu_backend.supports(*dtypes)


def resolve_backend(backend: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend that serves a call.

    ``"auto"`` takes the environment variable ``TUNA_KERNELS_BACKEND`` where it is set, else ``cpu`` or, on
    CUDA tensors, ``triton`` where it serves the inputs, else ``torch``.

    Raises:
        ValueError: unknown backend.
        RuntimeError: an explicit backend (or the one of the environment) that cannot serve these inputs.
    """
    asked, origin = backend, "backend"
    if backend == "auto":
        asked, origin = os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE
    if asked == "auto":
        first = "triton" if device.type == "cuda" else "cpu"
        if why_not(first, device, *dtypes):
            if device.type == "cpu" and not torch.compiler.is_compiling():
                warn_of_shadowing()
            return "torch"
        mention_unchecked(first, device)
        return first
    if asked not in BACKENDS:
        raise ValueError(f"{origin} = {asked!r} is not one of {('auto', *BACKENDS)}")
    reason = why_not(asked, device, *dtypes)
    if reason:
        raise CannotServe(f"{origin} = {asked!r} cannot serve this call: {reason}")
    return asked


def mention_unchecked(backend: str, device: torch.device) -> None:
    """Say once that the kernels have not been checked on this kind of card (`tuna_kernels.self_check`)."""
    if backend == "triton" and torch.cuda.is_available() and not torch.compiler.is_compiling():
        from tuna_kernels.self_check import warn_if_unchecked

        warn_if_unchecked(device)


def head_backend(backend: str) -> HeadBackend:
    """What a resolved backend other than ``reference`` does with the LM head."""
    if backend == "triton":
        from tuna_kernels.head.triton import launches  # imports triton

        return launches.BACKEND
    return tiled_backend(_cpu_backend.NativeTileOps() if backend == "cpu" else TorchTileOps())


def unit_gradient_pays(backend: str, width: int, *dtypes: torch.dtype) -> bool:
    """Whether a frozen head's forward should keep unit gradients (docs/numerics.md) rather than recompute later."""
    if backend != "triton":
        return True
    return slabs.unit_gradient_pays(width, *dtypes)


def show_config() -> str:
    """Versions, threads and backends as text, for bug reports."""
    lines = [
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.machine()}",
        f"threads {torch.get_num_threads()}, float32 products: {torch.get_float32_matmul_precision()}",
        f"{ENVIRONMENT_VARIABLE} = {os.environ.get(ENVIRONMENT_VARIABLE, '(not set)')}",
    ]
    if not _cpu_backend.WHY_NOT:
        lines.append(
            f"native code for {_cpu_backend.instruction_set().name} ({_cpu_backend.ISA_VARIABLE} may ask for less)"
        )
    lines += [f"{name} products: {whose}" for name, whose in _cpu_backend.products_chosen().items()]
    lines += [f"backend {name}: {reason or 'usable'}" for name, reason in available_backends().items()]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        chosen = resolve_backend("auto", torch.device(device), torch.float32)
        reason = why_not("triton" if device == "cuda" else "cpu", torch.device(device), torch.float32)
        lines.append(f"auto on {device}: {chosen}" + (f" ({reason})" if reason else ""))
    return "\n".join(lines)
