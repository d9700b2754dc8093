"""What a backend of the LM head is: five functions. Slots, validation, ops and the loss are the same for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tuna_kernels.head import tiled, tiled_selective
from tuna_kernels.head.tiled import ForwardResult, TileOps
from tuna_kernels.head.tiled_selective import SelectiveResult


class HeadBackend(NamedTuple):
    """Each with the arguments (but `ops`) and results of its namesake in `tiled` or `tiled_selective`."""

    forward: Callable[..., ForwardResult]
    backward: Callable[..., None]
    unit_rows: Callable[..., Tensor]
    selective_forward: Callable[..., SelectiveResult]
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
