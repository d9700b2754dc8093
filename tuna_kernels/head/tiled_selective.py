"""Log-probabilities of existing logits, some rows at a time, by the same tile operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tuna_kernels.head.slots import Slots
from tuna_kernels.head.tiled import LinearHead, RowGradient, SoftmaxState, Tile, TileOps, result_of

CHUNK_BYTES = 16 << 20


class SelectiveResult(NamedTuple):
    """Results [N] per row, 0 for ignored rows; the last two are for the backward (`tiled.ForwardResult`)."""

    logprobs: Tensor
    maximum: Tensor
    log_sum: Tensor


def _chunks(logits: Tensor, slots: Slots, compute: torch.dtype) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // max(1, compute.itemsize * logits.shape[1]))
    for start in range(0, slots.rows.numel(), rows):
        yield slice(start, min(start + rows, slots.rows.numel()))


def _tile(logits: Tensor, slots: Slots, part: slice) -> Tile:
    offsets = torch.arange(part.stop - part.start + 1, device=logits.device)  # one slot per row
    return Tile(logits, 0, None, offsets, slots.targets[part])


def forward(
    ops: TileOps, logits: Tensor, targets: Tensor, temperature: float, ignore_index: int, compute: torch.dtype
) -> SelectiveResult:
    """Log-probabilities of logits [N, V] divided by `temperature`."""
    slots = Slots.build(targets, None, ignore_index)
    head = LinearHead(logits, None, None, 1.0 / temperature, None)
    logprobs = torch.zeros(logits.shape[0], dtype=compute, device=logits.device)
    maximum, log_sum = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    for part in _chunks(logits, slots, compute):
        count = part.stop - part.start
        if slots.contiguous and logits.dtype == compute:
            z = logits[part]  # without a softcap the tile operations only read
        else:
            z = torch.empty(count, logits.shape[1], dtype=compute, device=logits.device)
            ops.load(z, logits, slots.rows[part])
        state = SoftmaxState(
            maximum=torch.full((count,), -torch.inf, dtype=compute, device=logits.device),
            sum=torch.zeros(count, dtype=torch.float64, device=logits.device),
            weighted=None,
            rescale=None,
            target_logit=torch.full((count,), torch.nan, dtype=compute, device=logits.device),
        )
        ops.softmax(_tile(z, slots, part), head, state)
        rows = slots.rows[part]
        result = result_of(head, slice(None), state.target_logit, state.maximum, state.sum.log())
        logprobs[rows], maximum[rows], log_sum[rows] = result.logprobs, result.maximum, result.log_sum
    return SelectiveResult(logprobs, maximum, log_sum)


def backward(
    ops: TileOps,
    grad_logprobs: Tensor,
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    temperature: float,
    ignore_index: int,
    out: Tensor,
) -> None:
    """Write the gradient to `out` [N, V] (may be `logits`); p - onehot is computed before rounding to its dtype."""
    compute = maximum.dtype
    slots = Slots.build(targets, None, ignore_index)
    head = LinearHead(logits, None, None, 1.0 / temperature, None)
    in_place = out.data_ptr() == logits.data_ptr()
    for part in _chunks(logits, slots, compute):
        rows = slots.rows[part]
        direct = slots.contiguous and logits.dtype == compute
        z = out[part] if direct else out.new_empty(rows.numel(), logits.shape[1], dtype=compute)
        if not (direct and in_place):
            ops.load(z, logits, rows)
        g = grad_logprobs[rows].to(compute)
        of_rows = RowGradient(maximum[rows], log_sum[rows], -g, None, None, g)
        ops.gradient(_tile(z, slots, part), head, of_rows, is_capped=False)
        if not direct:
            out[rows] = z.to(out.dtype)
    out[targets == ignore_index] = 0
