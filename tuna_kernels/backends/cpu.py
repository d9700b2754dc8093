"""Tile operations in C++ (csrc/cpu): float32 arithmetic on CPU tensors; float32, bfloat16, float16 sources.

Addresses, strides and a thread count cross the border; the extension knows nothing of torch.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .products import Products, TorchMultiply
from .slots import Slots
from .tiled import Head, RowGradient, SoftmaxState, Tile

try:
    from . import _cpu  # type: ignore[attr-defined]

    WHY_NOT = ""
except ImportError as error:
    _cpu = None
    WHY_NOT = f"the native extension _cpu is not there ({error}); was there a C++ compiler at install?"

ISA_VARIABLE = "TUNA_KERNELS_CPU_ISA"

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
    return dtype == torch.bfloat16 and not WHY_NOT and instruction_set() == _cpu.InstructionSet.avx512_bf16


def has_products() -> bool:
    """Whether matrices are multiplied by the native code, rather than by the BLAS."""
    return not WHY_NOT and bool(_cpu.has_products(instruction_set()))


def instruction_set() -> Any:
    """Which copy of the native code runs: the best for this processor, or a lesser one that the environment asks for.

    Raises:
        ValueError: TUNA_KERNELS_CPU_ISA is no instruction set.
    """
    best, sets = _cpu.best_instruction_set(), _cpu.InstructionSet.__members__
    asked = os.environ.get(ISA_VARIABLE, best.name)
    if asked not in sets:
        raise ValueError(f"{ISA_VARIABLE} = {asked!r} is not one of {tuple(sets)}")
    return min(best, sets[asked], key=int)


def native() -> Any:
    """The extension. Only for inputs that `supports` takes."""
    return _cpu


def address(tensor: Tensor | None) -> int:
    """Of the first element, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


class NativeTileOps:
    """See :class:`tuna_kernels.backends.tiled.TileOps`."""

    def load(self, out: Tensor, source: Tensor, index: Tensor | None) -> None:
        if out.dtype != torch.float32 and index is not None:  # bfloat16 that stays so
            torch.index_select(source, 0, index, out=out)
            return
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
            maximum=gradient.maximum.data_ptr(),
            log_sum=gradient.log_sum.data_ptr(),
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
        if not has_products():
            return Products(TorchMultiply(compute), self.load, slots, compute)
        return Products(_NativeMultiply(as_it_is=hidden == weight and multiplies(weight)), self.load, slots, compute)


class _NativeMultiply:
    """See :class:`tuna_kernels.backends.products.Multiply` and csrc/cpu/products.h.

    ``as_it_is``: bfloat16 operands are multiplied as bfloat16; gradients of logits are rounded to it, as on a GPU,
    logits not at all. Otherwise everything is float32.
    """

    converts = True

    def __init__(self, *, as_it_is: bool) -> None:
        self.rows = torch.bfloat16 if as_it_is else torch.float32
        best, sets = instruction_set(), _cpu.InstructionSet
        self._set = best if as_it_is or best != sets.avx512_bf16 else sets.avx512
        self._scratch: Tensor | None = None

    def __call__(self, out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
        rows, inner = left.shape
        is_read_in_place = self.rows == torch.float32 and not _is_transposed(left)
        scratch = None if is_read_in_place else self._buffer(rows, inner)
        _cpu.multiply_matrices(
            c=out.data_ptr(),
            stride=out.stride(0),
            rows=rows,
            columns=right.shape[1],
            inner=inner,
            left=_native_matrix(left),
            right=_native_matrix(right),
            add=add,
            scratch=address(scratch),
            threads=torch.get_num_threads(),
            instruction_set=self._set,
        )

    def _buffer(self, rows: int, inner: int) -> Tensor:
        size = _cpu.product_scratch(rows, inner)
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = None  # freed before there is a larger one
            self._scratch = torch.empty(size)
        return self._scratch


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.shape[1] > 1 and matrix.stride(1) != 1


def _native_matrix(matrix: Tensor) -> Any:
    """Rows, or columns, may lie anywhere, but their entries are neighbours."""
    transposed = _is_transposed(matrix)
    return _cpu.Matrix(
        data=matrix.data_ptr(),
        element=ELEMENTS[matrix.dtype],
        stride=matrix.stride(1 if transposed else 0),
        transposed=transposed,
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
