"""The interface of a backend of the LM head: five functions. Slots, validation, ops and the loss are shared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tuna_kernels.head import tiled, tiled_selective
from tuna_kernels.head.tiled import ForwardResult, TileOps
from tuna_kernels.head.tiled_selective import SelectiveResult


class HeadBackend(NamedTuple):
    """Functions with the arguments (except `ops`) and results of their namesakes in `tiled` or `tiled_selective`."""

    forward: Callable[..., ForwardResult]
    backward: Callable[..., None]
    unit_rows: Callable[..., Tensor]
    selective_forward: Callable[..., SelectiveResult]
    selective_backward: Callable[..., None]


def tiled_backend(ops: TileOps) -> HeadBackend:
    """The backend made of the tile loop and the tile operations `ops`."""
    return HeadBackend(
        partial(tiled.forward, ops),
        partial(tiled.backward, ops),
        tiled.unit_rows,
        partial(tiled_selective.forward, ops),
        partial(tiled_selective.backward, ops),
    )
