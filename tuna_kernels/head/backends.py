"""The backends of the LM head by name."""

from __future__ import annotations

import torch

from tuna_kernels.head.backend import HeadBackend, tiled_backend
from tuna_kernels.head.cpu import NativeTileOps
from tuna_kernels.head.torch import TorchTileOps
from tuna_kernels.head.triton import slabs


def head_backend(backend: str) -> HeadBackend:
    """The `HeadBackend` of a resolved backend other than `reference`."""
    if backend == "triton":
        from tuna_kernels.head.triton import launches  # imports triton

        return launches.BACKEND
    return tiled_backend(NativeTileOps() if backend == "cpu" else TorchTileOps())


def unit_gradient_pays(backend: str, width: int, *dtypes: torch.dtype) -> bool:
    """Whether a frozen head's forward should keep unit gradients (docs/numerics.md) instead of recomputing later."""
    if backend != "triton":
        return True
    return slabs.unit_gradient_pays(width, *dtypes)
