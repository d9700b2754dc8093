"""What a backend of the LM head is: five functions. Slots, validation, ops and the loss are the same for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tuna_kernels.head import tiled, tiled_selective
from tuna_kernels.head.cpu import NativeTileOps
from tuna_kernels.head.tiled import ForwardResult, TileOps
from tuna_kernels.head.torch import TorchTileOps
from tuna_kernels.head.triton import slabs


class HeadBackend(NamedTuple):
    """Arguments and results are those of the functions of these names in ``tiled`` and ``selective``, less ``ops``."""

    forward: Callable[..., ForwardResult]
    backward: Callable[..., None]
    unit_rows: Callable[..., Tensor]
    selective_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    selective_backward: Callable[..., None]


def tiled_backend(ops: TileOps) -> HeadBackend:
    """The tile loop over a backend's tile operations."""
    return HeadBackend(
        partial(tiled.forward, ops),
        partial(tiled.backward, ops),
        tiled.unit_rows,
        partial(tiled_selective.forward, ops),
        partial(tiled_selective.backward, ops),
    )


def head_backend(backend: str) -> HeadBackend:
    """What a resolved backend other than ``reference`` does with the LM head."""
    if backend == "triton":
        from tuna_kernels.head.triton import launches  # imports triton

        return launches.BACKEND
    return tiled_backend(NativeTileOps() if backend == "cpu" else TorchTileOps())


def unit_gradient_pays(backend: str, width: int, *dtypes: torch.dtype) -> bool:
    """Whether a frozen head's forward should keep unit gradients (docs/numerics.md) rather than recompute later."""
    if backend != "triton":
        return True
    return slabs.unit_gradient_pays(width, *dtypes)
