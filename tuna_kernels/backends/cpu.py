"""Tile operations in C++ (csrc/cpu): float32 arithmetic on CPU tensors; float32, bfloat16, float16 sources.

Addresses, strides and a thread count cross the border; the extension knows nothing of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pairs import PairProducts
from .products import ComputeProducts, Products
from .slots import Slots
from .tiled import Head, RowGradient, SoftmaxState, Tile

try:
    from . import _cpu  # type: ignore[attr-defined]

    WHY_NOT = ""
except ImportError as error:
    _cpu = None
    WHY_NOT = f"the native extension _cpu is not there ({error}); was there a C++ compiler at install?"

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How csrc/cpu/element.h numbers the types it takes."""


def supports(*dtypes: torch.dtype) -> str:
    """ "" if the native code takes these types, else the reason why not."""
    if WHY_NOT:
        return WHY_NOT
    bad = [str(d) for d in dtypes if d not in ELEMENTS]
    return f"it computes in float32 and does not take {', '.join(bad)}" if bad else ""


def multiplies(dtype: torch.dtype) -> bool:
    """Whether products of two operands of this type are taken as they are, rather than converted to float32."""
    return dtype == torch.bfloat16 and not WHY_NOT and bool(_cpu.has_pairs())


def native() -> Any:
    """The extension. Only for inputs that `supports` takes."""
    return _cpu


def address(tensor: Tensor | None) -> int:
    """Of the first element, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


class NativeTileOps:
    """See :class:`tuna_kernels.backends.tiled.TileOps`."""

    def load(self, out: Tensor, source: Tensor, index: Tensor | None) -> None:
        _cpu.load_rows(
            destination=out.data_ptr(),
            destination_stride=out.stride(0),
            source=source.data_ptr(),
            element=ELEMENTS[source.dtype],
            source_stride=source.stride(0),
            index=address(index),
            rows=out.shape[0],
            columns=out.shape[1],
            threads=torch.get_num_threads(),
        )

    def softmax(self, tile: Tile, head: Head, state: SoftmaxState) -> None:
        _cpu.softmax_tile(
            _native_tile(tile, head.logit_scale, head.softcap),
            maximum=state.maximum.data_ptr(),
            sum=state.sum.data_ptr(),
            weighted=address(state.weighted),
            shrink=address(state.shrink),
            chosen=state.chosen.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def gradient(self, tile: Tile, head: Head, gradient: RowGradient, *, is_capped: bool) -> None:
        _cpu.gradient_tile(
            _native_tile(tile, head.logit_scale, head.softcap),
            lse=gradient.lse.data_ptr(),
            softmax_weight=gradient.softmax_weight.data_ptr(),
            entropy_weight=address(gradient.entropy_weight),
            entropy=address(gradient.entropy),
            slot_gradient=gradient.slot_gradient.data_ptr(),
            is_capped=is_capped,
            threads=torch.get_num_threads(),
        )

    def scale_rows(self, x: Tensor, factor: Tensor) -> None:
        _cpu.scale_rows(
            x=x.data_ptr(),
            stride=x.stride(0),
            factor=factor.data_ptr(),
            rows=x.shape[0],
            columns=x.shape[1],
            threads=torch.get_num_threads(),
        )

    def products(self, slots: Slots, compute: torch.dtype, hidden: torch.dtype, weight: torch.dtype) -> Products:
        if hidden == weight and multiplies(weight):
            return PairProducts(_cpu, _pair_source, slots)
        return ComputeProducts(self.load, slots, compute, weight)


def _pair_source(source: Tensor, index: Tensor | None) -> Any:
    return _cpu.PairSource(
        data=source.data_ptr(),
        element=ELEMENTS[source.dtype],
        stride=source.stride(0),
        index=address(index),
        rows=source.shape[0] if index is None else index.numel(),
        columns=source.shape[1],
    )


def _native_tile(tile: Tile, scale: float, softcap: float | None) -> Any:
    return _cpu.Tile(
        x=tile.logits.data_ptr(),
        stride=tile.logits.stride(0),
        rows=tile.logits.shape[0],
        columns=tile.logits.shape[1],
        first_column=tile.first_column,
        scale=scale,
        cap=softcap or 0.0,
        bias=address(tile.bias),
        slot_offsets=tile.offsets.data_ptr(),
        slot_targets=tile.targets.data_ptr(),
    )
