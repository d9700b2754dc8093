"""The LM head on a GPU: log-probabilities and their gradients by kernels and cuBLAS products.

Forward, 2·N·V·D flops: one kernel, tiles only (`forward.py`). Backward, 6·N·V·D: the vocabulary in slabs; for each
a kernel recomputes the logits and writes their gradient in the dtype of the products (`gradient.py`), and cuBLAS adds
`slab @ W` to a float32 dX and writes `slab^T @ X`, all rows at once, as the finished slab of dW.

With a block (a ranking loss within its logits budget) cuBLAS computes the logits once, in float32, and forward and
backward read them from the block (`logits.py`): 6·N·V·D in total. With a frozen head the forward may keep the unit
gradient of each row: 4·N·V·D in total, see `unit_gradient_pays`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tuna_kernels.gpu import launch
from tuna_kernels.head.backend import HeadBackend
from tuna_kernels.head.slots import Slots
from tuna_kernels.head.tiled import ForwardResult, Gradients, Inputs, LinearHead, RowGradient
from tuna_kernels.head.tiled_selective import SelectiveResult
from tuna_kernels.head.triton.forward import Partials, finish, launch_forward
from tuna_kernels.head.triton.gradient import launch_gradient
from tuna_kernels.head.triton.logits import launch_logits_forward, launch_logits_gradient, splits_of
from tuna_kernels.head.triton.products import multiply, product_type
from tuna_kernels.head.triton.slabs import slab_columns
from tuna_kernels.head.triton.unit import unit_rows


def _slabs(rows: int, vocabulary: int, itemsize: int) -> Iterator[tuple[int, int]]:
    step = slab_columns(rows, vocabulary, itemsize)
    for first in range(0, vocabulary, step):
        yield first, min(first + step, vocabulary)


def forward(
    inputs: Inputs,
    head: LinearHead,
    slots: Slots,
    compute: torch.dtype,
    *,
    want_entropy: bool = False,
    want_unit: bool = False,
    block: Tensor | None = None,
) -> ForwardResult:
    """As `tiled.forward`."""
    rows = slots.rows.numel()
    if rows == 0:
        empty = inputs.hidden.new_empty(0, dtype=compute)
        unit = empty.view(0, head.weight.shape[1]) if want_unit else None
        return ForwardResult(empty, empty, empty, empty, empty, empty if want_entropy else None, unit)
    if want_unit:
        return _forward_with_unit(inputs, head, slots)
    if block is not None:
        return _forward_in_block(inputs, head, slots, block)
    return finish(
        launch_forward(inputs, head, slots, want_entropy=want_entropy),
        head,
        slots.offsets,
        rows,
        want_entropy=want_entropy,
    )


def _gathered(source: Tensor, slots: Slots, dtype: torch.dtype) -> Tensor:
    """The hidden rows of `slots` [R, D] in the dtype of the products; a view if possible."""
    rows = source[: slots.rows.numel()] if slots.contiguous else source.index_select(0, slots.rows)
    return rows.to(dtype)


def _products(
    inputs: Inputs, head: LinearHead, slots: Slots, out: Tensor, first: int, last: int, hidden: Tensor
) -> None:
    """`h W^T + h2 W2^T` of vocabulary entries `first … last` into `out`, float32, by cuBLAS."""
    multiply(out, hidden, head.weight[first:last].to(hidden.dtype).t(), add=False)
    if inputs.low_rank is not None and head.low_rank_weight is not None:
        low_type = product_type(inputs.low_rank.dtype, head.low_rank_weight.dtype)
        low_weight = head.low_rank_weight[first:last].to(low_type)
        multiply(out, _gathered(inputs.low_rank, slots, low_type), low_weight.t(), add=True)


def _forward_in_block(inputs: Inputs, head: LinearHead, slots: Slots, block: Tensor) -> ForwardResult:
    rows = slots.rows.numel()
    dtype = product_type(inputs.hidden.dtype, head.weight.dtype)
    hidden = _gathered(inputs.hidden, slots, dtype)
    for first, last in _slabs(rows, head.vocabulary, 4):
        _products(inputs, head, slots, block[:, first:last], first, last, hidden)
    partials = Partials.empty(splits_of(block), rows, slots.targets.numel(), block.device, weighted=False)
    launch_logits_forward(block, head, slots.targets, slots.offsets, *partials)
    return finish(partials, head, slots.offsets, rows, want_entropy=False)


def _forward_with_unit(inputs: Inputs, head: LinearHead, slots: Slots) -> ForwardResult:
    """Slab by slab: logits by cuBLAS, their softmax, then exponentials relative to the running maximum times W."""
    rows, width = slots.rows.numel(), head.weight.shape[1]
    device, new = inputs.hidden.device, torch.empty
    dtype = product_type(inputs.hidden.dtype, head.weight.dtype)
    hidden = _gathered(inputs.hidden, slots, dtype)
    slabs = list(_slabs(rows, head.vocabulary, 4))
    storage = new(rows * (slabs[0][1] - slabs[0][0]), device=device)
    shapes = [storage[: rows * (last - first)].view(rows, last - first) for first, last in slabs]
    splits = [splits_of(logits) for logits in shapes]
    partials = Partials.empty(sum(splits), rows, slots.targets.numel(), device, weighted=False)
    unit = torch.zeros(rows, width, device=device)
    ones, zeros, none = torch.ones(rows, device=device), torch.zeros(rows, device=device), new(0, device=device)
    maximum = torch.full((rows,), -torch.inf, device=device)
    rate = launch.LOG2_E * head.factor
    at = 0
    for (first, last), logits, count in zip(slabs, shapes, splits, strict=True):
        _products(inputs, head, slots, logits, first, last, hidden)
        part = partials.maximum[at : at + count]
        sums = partials.total[at : at + count]
        launch_logits_forward(
            logits, head, slots.targets, slots.offsets, part, sums, None, partials.target_logit, first=first
        )
        larger = torch.maximum(maximum, part.amax(0))
        reference = torch.where(larger == -torch.inf, 0, larger)
        unit.mul_(torch.exp2((maximum - reference) * rate).unsqueeze(1))
        exponentials = logits if dtype == torch.float32 else new(logits.shape, dtype=dtype, device=device)
        against = RowGradient(reference, zeros, ones, None, None, none)
        launch_logits_gradient(logits, head, slots.targets, slots.offsets, against, exponentials, first=first)
        multiply(unit, exponentials, head.weight[first:last].to(dtype), add=True)
        maximum, at = larger, at + count
    result = finish(partials, head, slots.offsets, rows, want_entropy=False)
    reference = torch.where(maximum == -torch.inf, 0, maximum)
    unit.div_((partials.total * torch.exp2((partials.maximum - reference) * rate)).sum(0).unsqueeze(1))
    return result._replace(unit=unit)


def _against_underflow(gradient: RowGradient, logit_scale: float, dtype: torch.dtype) -> Tensor | None:
    """For float16 slabs, a power of two that scales the largest coefficient to about 1, on the device; else None.

    A mean over many tokens gives gradients of logits that float16 would flush to zero, and a steep scale gives some
    that overflow it; the float32 results of the products are scaled back.
    """
    if dtype != torch.float16:
        return None
    peak = gradient.softmax_weight.abs().amax()
    for other in (gradient.slot_gradient, gradient.entropy_weight):
        if other is not None and other.numel():
            peak = torch.maximum(peak, other.abs().amax())
    peak = peak * abs(logit_scale)
    exponent = torch.where(peak > 0, peak.log2().ceil(), 0).nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100)
    return torch.exp2(-exponent).reshape(1)


def backward(
    inputs: Inputs,
    head: LinearHead,
    slots: Slots,
    compute: torch.dtype,
    gradient: RowGradient,
    into: Gradients,
    *,
    block: Tensor | None = None,
    block_rows: Tensor | None = None,
) -> None:
    """As `tiled.backward`."""
    if not into.any:
        return
    rows, vocabulary = slots.rows.numel(), head.vocabulary
    for buffer in into.of_rows if rows or into.accumulate else [*into.of_rows, *into.of_vocabulary]:
        buffer.zero_()
    if rows == 0:
        return
    dtype = product_type(inputs.hidden.dtype, head.weight.dtype)
    factor = _against_underflow(gradient, head.logit_scale, dtype)
    writer = SlabWriter(inputs, head, slots, into, dtype, factor)
    base2 = gradient._replace(log_sum=gradient.log_sum * launch.LOG2_E)
    storage = torch.empty(
        rows * slab_columns(rows, vocabulary, dtype.itemsize), dtype=dtype, device=inputs.hidden.device
    )
    for first, last in _slabs(rows, vocabulary, dtype.itemsize):
        slab = storage[: rows * (last - first)].view(rows, last - first)
        if block is None:
            sums, peaks = launch_gradient(
                inputs, head, slots, base2, slab, first,
                factor=factor, want_sums=into.bias is not None, want_peaks=into.filter_eps > 0,
            )  # fmt: skip
        else:
            sums = launch_logits_gradient(
                block[:, first:last], head, slots.targets, slots.offsets, base2, slab,
                rows=block_rows, first=first, factor=factor, want_sums=into.bias is not None,
            )  # fmt: skip
            peaks = None
        writer.add(slab, sums, first, last, _kept(peaks, into.filter_eps))
    writer.finish()


def _kept(peaks: Tensor | None, filter_eps: float) -> Tensor | None:
    """Columns of a slab that the filter keeps (NaN counts as large), None for all. Synchronizes."""
    if peaks is None:
        return None
    kept = (~(peaks < filter_eps)).nonzero().squeeze(1)
    return None if kept.numel() == peaks.numel() else kept


class SlabWriter:
    """Multiplies slabs of gradients, all rows at once, into the requested gradients."""

    def __init__(
        self, inputs: Inputs, head: LinearHead, slots: Slots, into: Gradients, dtype: torch.dtype, factor: Tensor | None
    ) -> None:
        self.into, self.dtype = into, dtype
        self.unscale = None if factor is None else factor.reciprocal()
        self.row_products = into.row_products(head)
        self.weight_products = [
            (out, _gathered(source, slots, dtype if source is inputs.hidden else source.dtype))
            for out, source in into.weight_products(inputs)
        ]

    def add(self, slab: Tensor, sums: Tensor | None, first: int, last: int, kept: Tensor | None) -> None:
        """Add the products of `slab` [R, last - first], using only its columns `kept` (None: all)."""
        into = self.into

        def columns(source: Tensor) -> Tensor:
            part = source[first:last]
            return part if kept is None else part.index_select(0, kept)

        slab = slab if kept is None else slab.index_select(1, kept)
        for out, weight in self.row_products:
            part = columns(weight)
            multiply(out, slab, part.to(self.dtype) if out is into.rows else part, add=True)
        for out, right in self.weight_products:
            self._columns(out[first:last], slab, right, kept)
        if into.bias is not None and sums is not None:
            bias = into.bias[first:last]
            bias.copy_(bias + sums if into.accumulate else sums)

    def _columns(self, out: Tensor, slab: Tensor, right: Tensor, kept: Tensor | None) -> None:
        """`out (+)= slab^T right`, rounded once to the gradient's dtype."""
        add = self.into.accumulate
        plain = self.unscale is None and kept is None
        if plain and (out.dtype == torch.float32 or (out.dtype == slab.dtype == right.dtype and not add)):
            multiply(out, slab.t(), right, add=add)
            return
        product = torch.empty(slab.shape[1], right.shape[1], dtype=torch.float32, device=out.device)
        multiply(product, slab.t(), right, add=False)
        if self.unscale is not None:
            product.mul_(self.unscale)
        if kept is None:
            out.copy_(product.add_(out) if add else product)
        elif add:
            out.index_add_(0, kept, product.to(out.dtype))
        else:
            out.zero_().index_copy_(0, kept, product.to(out.dtype))

    def finish(self) -> None:
        if self.unscale is not None:
            for buffer in self.into.of_rows:
                buffer.mul_(self.unscale)


def selective_forward(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int, compute: torch.dtype
) -> SelectiveResult:
    """As `tiled_selective.forward`."""
    rows, targets = logits.shape[0], targets.contiguous()
    if rows == 0:
        empty = logits.new_empty(0, dtype=compute)
        return SelectiveResult(empty, empty.clone(), empty.clone())
    head = LinearHead(logits, None, None, 1.0 / temperature, None)
    partials = Partials.empty(splits_of(logits), rows, rows, logits.device, weighted=False)
    launch_logits_forward(logits, head, targets, None, *partials, ignore_index=ignore_index)
    result = finish(partials, head, None, rows, want_entropy=False)
    counted = targets != ignore_index
    return SelectiveResult(*(torch.where(counted, x, 0) for x in (result.logprobs, result.maximum, result.log_sum)))


def selective_backward(
    grad_logprobs: Tensor,
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    temperature: float,
    ignore_index: int,
    out: Tensor,
) -> None:
    """As `tiled_selective.backward`."""
    if logits.shape[0] == 0:
        return
    head = LinearHead(logits, None, None, 1.0 / temperature, None)
    g, targets = grad_logprobs.to(maximum.dtype).contiguous(), targets.contiguous()
    gradient = RowGradient(maximum, log_sum * launch.LOG2_E, -g, None, None, g)
    launch_logits_gradient(logits, head, targets, None, gradient, out, ignore_index=ignore_index)


BACKEND = HeadBackend(forward, backward, unit_rows, selective_forward, selective_backward)
