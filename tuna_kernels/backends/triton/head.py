"""The LM head on a GPU: which kernels and which cuBLAS products make log-probabilities and their gradients.

Forward, 2·N·V·D flops: one kernel, tiles only (``forward.py``). Backward, 6·N·V·D: the vocabulary in slabs; for each
a kernel computes the logits again and writes their gradient in the products' type (``gradient.py``), and cuBLAS adds
``slab @ W`` into a float32 dX and writes ``slab^T @ X``, all rows at once, as the finished slab of dW.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..head import HeadBackend
from ..slots import Slots
from ..tiled import ForwardResult, Gradients, Head, Inputs, RowGradient
from .forward import finish, launch_forward
from .gradient import launch_gradient
from .products import HALF, multiply, product_type

SLAB_BYTES = 256 << 20  # of dlogits: products of 16384 columns for 8192 rows, which cuBLAS runs at full speed
MIN_COLUMNS = 512


def slab_columns(rows: int, vocabulary: int, itemsize: int) -> int:
    """Vocabulary entries of a slab of at most ``SLAB_BYTES``, in multiples of 512; all rows go in one product."""
    fitting = SLAB_BYTES // max(1, rows * itemsize) // MIN_COLUMNS * MIN_COLUMNS
    return min(vocabulary, max(MIN_COLUMNS, fitting))


def forward(
    inputs: Inputs,
    head: Head,
    slots: Slots,
    compute: torch.dtype,
    *,
    want_entropy: bool = False,
    want_unit: bool = False,
    block: Tensor | None = None,
) -> ForwardResult:
    """As ``tiled.forward``."""
    rows = slots.rows.numel()
    if rows == 0:
        empty = inputs.hidden.new_empty(0, dtype=compute)
        return ForwardResult(empty, empty, empty if want_entropy else None, None)
    partials = launch_forward(inputs, head, slots, want_entropy=want_entropy)
    return finish(partials, slots.offsets, rows, want_entropy=want_entropy)


def _slabs(rows: int, vocabulary: int, itemsize: int) -> Iterator[tuple[int, int]]:
    step = slab_columns(rows, vocabulary, itemsize)
    for first in range(0, vocabulary, step):
        yield first, min(first + step, vocabulary)


def _gathered(source: Tensor, slots: Slots, dtype: torch.dtype) -> Tensor:
    """The hidden rows of ``slots`` [R, D] in the products' type; a view where they are that already."""
    rows = source[: slots.rows.numel()] if slots.contiguous else source.index_select(0, slots.rows)
    return rows.to(dtype)


def _scale_against_underflow(gradient: RowGradient, dtype: torch.dtype) -> Tensor | None:
    """For float16 slabs a power of two that brings the largest coefficient to about 1, on the device; else None.

    The mean over many tokens makes gradients of logits that float16 would flush to zero; the products' float32
    results are scaled back.
    """
    if dtype != torch.float16:
        return None
    peak = gradient.softmax_weight.abs().amax()
    for other in (gradient.slot_gradient, gradient.entropy_weight):
        if other is not None and other.numel():
            peak = torch.maximum(peak, other.abs().amax())
    exponent = torch.where(peak > 0, peak.log2().ceil(), 0).nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100)
    return torch.exp2(-exponent).reshape(1)


def backward(
    inputs: Inputs,
    head: Head,
    slots: Slots,
    compute: torch.dtype,
    gradient: RowGradient,
    into: Gradients,
    *,
    block: Tensor | None = None,
    block_rows: Tensor | None = None,
) -> None:
    """As ``tiled.backward``."""
    if not into.any:
        return
    rows, vocabulary = slots.rows.numel(), head.vocabulary
    for buffer in (into.rows, into.low_rank_rows):
        if buffer is not None:
            buffer.zero_()
    if rows == 0:
        for buffer in (into.weight, into.low_rank_weight, into.bias):
            if buffer is not None and not into.accumulate:
                buffer.zero_()
        return
    dtype = product_type(inputs.hidden.dtype, head.weight.dtype)
    factor = _scale_against_underflow(gradient, dtype)
    sinks = _Sinks(inputs, head, slots, into, dtype, factor)
    columns = slab_columns(rows, vocabulary, dtype.itemsize)
    storage = torch.empty(rows * columns, dtype=dtype, device=inputs.hidden.device)
    for first, last in _slabs(rows, vocabulary, dtype.itemsize):
        slab = storage[: rows * (last - first)].view(rows, last - first)
        sums, _ = launch_gradient(
            inputs, head, slots, gradient, slab, first,
            factor=factor, want_sums=into.bias is not None, want_peaks=False,
        )  # fmt: skip
        sinks.add(slab, sums, first, last)
    sinks.finish()


class _Sinks:
    """Multiplies slabs into the gradients asked for."""

    def __init__(
        self, inputs: Inputs, head: Head, slots: Slots, into: Gradients, dtype: torch.dtype, factor: Tensor | None
    ) -> None:
        self.head, self.into, self.dtype = head, into, dtype
        self.unscale = None if factor is None else factor.reciprocal()
        self.hidden = _gathered(inputs.hidden, slots, dtype) if into.weight is not None else None
        low = inputs.low_rank if into.low_rank_weight is not None else None
        self.low_hidden = None if low is None else _gathered(low, slots, low.dtype)

    def add(self, slab: Tensor, sums: Tensor | None, first: int, last: int) -> None:
        into, head = self.into, self.head
        if into.rows is not None:
            multiply(into.rows, slab, head.weight[first:last].to(self.dtype), add=True)
        if into.low_rank_rows is not None and head.low_rank_weight is not None:
            multiply(into.low_rank_rows, slab, head.low_rank_weight[first:last], add=True)
        if into.weight is not None and self.hidden is not None:
            self._columns(into.weight[first:last], slab, self.hidden)
        if into.low_rank_weight is not None and self.low_hidden is not None:
            self._columns(into.low_rank_weight[first:last], slab, self.low_hidden)
        if into.bias is not None and sums is not None:
            bias = into.bias[first:last]
            bias.copy_(bias + sums if into.accumulate else sums)

    def _columns(self, out: Tensor, slab: Tensor, right: Tensor) -> None:
        """``out (+)= slab^T right``, finished: rounded to the gradient's type once."""
        direct = self.unscale is None and out.dtype in (torch.float32, slab.dtype)
        if direct and (out.dtype == torch.float32 or (right.dtype == out.dtype and not self.into.accumulate)):
            multiply(out, slab.t(), right, add=self.into.accumulate)
            return
        product = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        multiply(product, slab.t(), right, add=False)
        if self.unscale is not None:
            product.mul_(self.unscale)
        out.copy_(product.add_(out) if self.into.accumulate else product)

    def finish(self) -> None:
        if self.unscale is not None:
            for buffer in (self.into.rows, self.into.low_rank_rows):
                if buffer is not None:
                    buffer.mul_(self.unscale)


BACKEND = HeadBackend(forward, backward, forward, backward)
