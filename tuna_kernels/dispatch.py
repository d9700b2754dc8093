"""The choice of backend: which are available, why others are not, and what `auto` chooses."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from tuna_kernels import native
from tuna_kernels.errors import CannotServe
from tuna_kernels.gpu import availability, checked_cards
from tuna_kernels.installation import warn_of_shadowing

BACKENDS = ("reference", "torch", "cpu", "triton")
ENVIRONMENT_VARIABLE = "TUNA_KERNELS_BACKEND"


def available_backends() -> dict[str, str]:
    """Every backend with the reason why it is unavailable; an empty reason means it is available.

    Examples:
        >>> available_backends()["reference"]
        ''
    """
    return {"reference": "", "torch": "", "cpu": native.WHY_NOT_HERE, "triton": availability.why_not_here()}


def why_not(backend: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """ "" if `backend` supports these inputs, else the reason why not."""
    if backend == "triton":
        return availability.why_not(device, *dtypes)
    if backend != "cpu":
        return ""
    if device.type != "cpu":
        return f"it computes on CPU tensors, the inputs are on {device}"
    return native.why_not(*dtypes)


def resolve_backend(
    backend: str,
    device: torch.device,
    *dtypes: torch.dtype,
    known: Sequence[str] = BACKENDS,
    refuses: Callable[[str], str] | None = None,
) -> str:
    """The backend for a call, out of `known`; `refuses` gives the reason why a backend does not support it (default:
    `why_not` for the device and dtypes).

    `"auto"` uses the environment variable `TUNA_KERNELS_BACKEND` if set; else `cpu`, or `triton` for
    CUDA tensors, if it supports the inputs; else `torch`.

    Raises:
        ValueError: unknown backend.
        RuntimeError: an explicit backend (or the one of the environment) that does not support these inputs.
    """
    refuses = refuses or (lambda name: why_not(name, device, *dtypes))
    asked, origin = backend, "backend"
    if backend == "auto":
        asked, origin = os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE
    if asked == "auto":
        first = "triton" if device.type == "cuda" else "cpu"
        if refuses(first):
            if device.type == "cpu" and not torch.compiler.is_compiling():
                warn_of_shadowing()
            return "torch"
        mention_unchecked(first, device)
        return first
    if asked not in known:
        raise ValueError(f"{origin} = {asked!r} is not one of {('auto', *known)}")
    if reason := refuses(asked):
        raise CannotServe(f"{origin} = {asked!r} does not support this call: {reason}")
    return asked


def mention_unchecked(backend: str, device: torch.device) -> None:
    """Warn once if the kernels have not been checked on this kind of card (`tuna_kernels.self_check`)."""
    if backend == "triton" and torch.cuda.is_available() and not torch.compiler.is_compiling():
        checked_cards.warn_if_unchecked(device)
