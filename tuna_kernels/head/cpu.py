"""Tile operations in C++ (csrc/cpu): float32 arithmetic on CPU tensors; float32, bfloat16, float16 sources.

The interface is addresses, strides and a thread count; the extension does not depend on torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tuna_kernels.head.product_choice import BLAS, OWN, Choice, Run, choose
from tuna_kernels.head.products import Multiply, Products, TorchMultiply
from tuna_kernels.head.slots import Slots
from tuna_kernels.head.tiled import LinearHead, RowGradient, SoftmaxState, Tile
from tuna_kernels.native import ELEMENTS, WHY_NOT_HERE, address, instruction_set, native

NAMES = {OWN: "our own", BLAS: "the BLAS's"}


def multiplies(dtype: torch.dtype) -> bool:
    """Whether two operands of this dtype are multiplied directly, without conversion to float32."""
    return dtype == torch.bfloat16 and has_products(dtype) and _product_type(dtype, dtype) == dtype


def has_products(hidden: torch.dtype, weight: torch.dtype | None = None) -> bool:
    """Whether matrices of these dtypes are multiplied by the native code instead of the BLAS."""
    choice = product_choice_of(_product_type(hidden, hidden if weight is None else weight))
    return choice is not None and choice.way == OWN


def product_choice_of(dtype: torch.dtype) -> Choice | None:
    """Whose products of this dtype are used (float32, or bfloat16 multiplied directly); None if we have none."""
    if WHY_NOT_HERE or not native().has_products(instruction_set()) or dtype != _product_type(dtype, dtype):
        return None

    def products(multiply: Multiply) -> Run:
        return _three_products(multiply, dtype)

    return choose(
        dtype,
        instruction_set().name,
        lambda: products(_NativeMultiply(as_it_is=dtype == torch.bfloat16)),
        lambda: products(TorchMultiply(torch.float32)),
    )


def products_chosen() -> dict[str, str]:
    """By dtype of the operands, whose products are used and why; chooses if not yet chosen."""
    types = dict.fromkeys(_product_type(t, t) for t in (torch.float32, torch.bfloat16)) if not WHY_NOT_HERE else {}
    chosen = {str(t).removeprefix("torch."): product_choice_of(t) for t in types}
    return {
        name: f"{NAMES[choice.way]} ({choice.reason})" if choice else "the BLAS's (none of our own for this processor)"
        for name, choice in chosen.items()
    }


def _product_type(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """The dtype in which our own products multiply such operands."""
    packs = not WHY_NOT_HERE and instruction_set() == native().InstructionSet.avx512_bf16
    return torch.bfloat16 if packs and hidden == weight == torch.bfloat16 else torch.float32


def _three_products(multiply: Multiply, dtype: torch.dtype) -> Run:
    """The products of a tile, forward and backward, for timing by `product_choice`: 0.1 Gflop each."""
    rows, columns, width = 128, 768, 512
    hidden, weight = torch.ones(rows, width, dtype=dtype), torch.ones(columns, width, dtype=dtype)
    tile, to_rows, to_weight = torch.ones(rows, columns), torch.zeros(rows, width), torch.zeros(columns, width)
    index = torch.arange(rows)
    slots = Slots.build(torch.zeros_like(index), index, ignore_index=-1)
    every_row, every_column = slice(0, rows), slice(0, columns)

    def run() -> None:
        products = Products(multiply, NativeTileOps().load, slots, torch.float32)
        products.logits(tile, hidden, every_row, weight, every_column, add=False)
        products.add_to_rows(to_rows, tile, weight, every_column)
        products.to_weight(to_weight, tile, hidden, every_row, add=False)

    return run


class NativeTileOps:
    """See `tuna_kernels.head.tiled.TileOps`."""

    def load(self, out: Tensor, source: Tensor, index: Tensor | None) -> None:
        if out.dtype != torch.float32 and index is not None:  # bfloat16 without conversion
            torch.index_select(source, 0, index, out=out)
            return
        native().load_rows(
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

    def softmax(self, tile: Tile, head: LinearHead, state: SoftmaxState) -> None:
        native().softmax_tile(
            _native_tile(tile, head.logit_scale, head.softcap),
            maximum=state.maximum.data_ptr(),
            sum=state.sum.data_ptr(),
            weighted=address(state.weighted),
            rescale=address(state.rescale),
            target_logit=state.target_logit.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def gradient(self, tile: Tile, head: LinearHead, gradient: RowGradient, *, is_capped: bool) -> None:
        native().gradient_tile(
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
        native().scale_rows(
            x=x.data_ptr(),
            stride=x.stride(0),
            factor=factor.data_ptr(),
            rows=x.shape[0],
            columns=x.shape[1],
            threads=torch.get_num_threads(),
        )

    def products(self, slots: Slots, compute: torch.dtype, hidden: torch.dtype, weight: torch.dtype) -> Products:
        if not has_products(hidden, weight):
            return Products(TorchMultiply(compute), self.load, slots, compute)
        as_it_is = _product_type(hidden, weight) == torch.bfloat16
        return Products(_NativeMultiply(as_it_is=as_it_is), self.load, slots, compute)


class _NativeMultiply:
    """See `tuna_kernels.head.products.Multiply` and csrc/cpu/head/products.h.

    `as_it_is`: bfloat16 operands are multiplied as bfloat16; gradients of logits are rounded to it, as on a GPU,
    but logits are not. Otherwise everything is float32.
    """

    converts = True

    def __init__(self, *, as_it_is: bool) -> None:
        self.rows = torch.bfloat16 if as_it_is else torch.float32
        best, sets = instruction_set(), native().InstructionSet
        self._set = best if as_it_is or best != sets.avx512_bf16 else sets.avx512
        self._scratch: Tensor | None = None

    def __call__(self, out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
        rows, inner = left.shape
        is_read_in_place = self.rows == torch.float32 and not _is_transposed(left)
        scratch = None if is_read_in_place else self._buffer(rows, inner)
        native().multiply_matrices(
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
        size = native().product_scratch(rows, inner)
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = None  # freed before the larger one is allocated
            self._scratch = torch.empty(size)
        return self._scratch


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.shape[1] > 1 and matrix.stride(1) != 1


def _native_matrix(matrix: Tensor) -> Any:
    """Rows (or columns) may have any stride, but must be contiguous."""
    transposed = _is_transposed(matrix)
    return native().Matrix(
        data=matrix.data_ptr(),
        element=ELEMENTS[matrix.dtype],
        stride=matrix.stride(1 if transposed else 0),
        transposed=transposed,
    )


def _native_tile(tile: Tile, scale: float, softcap: float | None) -> Any:
    return native().Tile(
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
