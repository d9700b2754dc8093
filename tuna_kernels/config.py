"""Which backend computes: what is usable here, why another is not, and what ``auto`` chooses."""

from __future__ import annotations

import os
import platform

import torch

from .backends import cpu as _cpu_backend
from .backends.tiled import TileOps
from .backends.torch import TorchTileOps

BACKENDS = ("reference", "torch", "cpu")
ENVIRONMENT_VARIABLE = "TUNA_KERNELS_BACKEND"


def available_backends() -> dict[str, str]:
    """Every backend and the reason why it cannot be used here; an empty reason means it can.

    >>> available_backends()["reference"]
    ''
    """
    return {"reference": "", "torch": "", "cpu": _cpu_backend.WHY_NOT}


def why_not(backend: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """ "" if ``backend`` serves these inputs, else the reason why not."""
    if backend != "cpu":
        return ""
    if device.type != "cpu":
        return f"it computes on CPU tensors, the inputs are on {device}"
    return _cpu_backend.supports(*dtypes)


def resolve_backend(backend: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend that serves a call.

    ``"auto"`` takes the environment variable ``TUNA_KERNELS_BACKEND`` where it is set, else ``cpu`` where it
    serves the inputs, else ``torch``.

    Raises:
        ValueError: unknown backend.
        RuntimeError: an explicit backend (or the one of the environment) that cannot serve these inputs.
    """
    asked, origin = backend, "backend"
    if backend == "auto":
        asked, origin = os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE
    if asked == "auto":
        return "torch" if why_not("cpu", device, *dtypes) else "cpu"
    if asked not in BACKENDS:
        raise ValueError(f"{origin} = {asked!r} is not one of {('auto', *BACKENDS)}")
    reason = why_not(asked, device, *dtypes)
    if reason:
        raise RuntimeError(f"{origin} = {asked!r} cannot serve this call: {reason}")
    return asked


def tile_ops(backend: str) -> TileOps:
    """The tile operations of a resolved backend other than ``reference``."""
    return _cpu_backend.NativeTileOps() if backend == "cpu" else TorchTileOps()


def show_config() -> str:
    """Versions, threads and backends as text, for bug reports."""
    lines = [
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.machine()}",
        f"threads {torch.get_num_threads()}, float32 products: {torch.get_float32_matmul_precision()}",
        f"{ENVIRONMENT_VARIABLE} = {os.environ.get(ENVIRONMENT_VARIABLE, '(not set)')}",
    ]
    lines += [f"backend {name}: {reason or 'usable'}" for name, reason in available_backends().items()]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        chosen = resolve_backend("auto", torch.device(device), torch.float32)
        lines.append(
            f"auto on {device}: {chosen}"
            + ("" if chosen == device else f" ({why_not('cpu', torch.device(device), torch.float32)})")
        )
    return "\n".join(lines)
