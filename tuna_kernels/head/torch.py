"""Tile operations in plain torch: any device, float32 and float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tuna_kernels.head.products import Products, TorchMultiply
from tuna_kernels.head.slots import Slots
from tuna_kernels.head.tiled import LinearHead, RowGradient, SoftmaxState, Tile


class TorchTileOps:
    """See `tuna_kernels.head.tiled.TileOps`."""

    def load(self, out: Tensor, source: Tensor, index: Tensor | None) -> None:
        if index is None:
            out.copy_(source)
        elif source.dtype == out.dtype:
            torch.index_select(source, 0, index, out=out)
        else:
            out.copy_(source.index_select(0, index))

    def softmax(self, tile: Tile, head: LinearHead, state: SoftmaxState) -> None:
        v = _transform_(tile, head)
        rows, columns, slots = _targets_in(tile)
        state.target_logit[slots] = v[rows, columns]
        before = state.maximum.clone()
        torch.maximum(before, v.amax(1), out=state.maximum)
        # Only -inf so far: subtract 0, so that the sums stay 0 instead of NaN.
        reference = torch.where(state.maximum == -torch.inf, 0, state.maximum)
        fall = (before - reference) * head.factor
        rescale = fall.exp()
        below = _below(v, reference, head)
        exponentials = below.exp()
        if state.weighted is not None:
            product = torch.where(exponentials == 0, 0, exponentials * below)
            moved = torch.where(rescale == 0, 0, state.sum * fall)
            state.weighted.add_(moved).mul_(rescale).add_(product.sum(1))
        state.sum.mul_(rescale).add_(exponentials.sum(1))
        if state.rescale is not None:
            state.rescale.copy_(rescale)
            tile.logits.copy_(_chain_(exponentials, v, head))

    def gradient(self, tile: Tile, head: LinearHead, gradient: RowGradient, *, is_capped: bool) -> None:
        v = tile.logits if is_capped and head.softcap is not None else _transform_(tile, head)
        log_p = _below(v, gradient.maximum, head) - gradient.log_sum.unsqueeze(1)
        d = log_p.exp()
        if gradient.entropy_weight is None or gradient.entropy is None:
            d.mul_(gradient.softmax_weight.unsqueeze(1))
        else:
            surprise = torch.where(d == 0, 0, log_p + gradient.entropy.unsqueeze(1))
            d.mul_(gradient.softmax_weight.unsqueeze(1) - gradient.entropy_weight.unsqueeze(1) * surprise)
        rows, columns, slots = _targets_in(tile)
        d.index_put_((rows, columns), gradient.slot_gradient[slots], accumulate=True)
        tile.logits.copy_(_chain_(d, v, head))

    def scale_rows(self, x: Tensor, factor: Tensor) -> None:
        x.mul_(factor.unsqueeze(1))

    def products(self, slots: Slots, compute: torch.dtype, hidden: torch.dtype, weight: torch.dtype) -> Products:
        return Products(TorchMultiply(compute), self.load, slots, compute)


def _transform_(tile: Tile, head: LinearHead) -> Tensor:
    """v of the tile; with a softcap it is written to the tile, otherwise the tile keeps x."""
    v = tile.logits
    if tile.bias is not None:
        v = v + tile.bias
    if head.softcap is None:
        return -v if head.sign < 0 else v
    if head.logit_scale != 1.0:
        v = v * head.logit_scale
    tile.logits.copy_(torch.tanh(v / head.softcap).mul_(head.softcap))
    return tile.logits


def _below(v: Tensor, maximum: Tensor, head: LinearHead) -> Tensor:
    """`z - largest z`, with the difference taken first."""
    below = v - maximum.unsqueeze(1)
    return below if head.factor == 1.0 else below.mul_(head.factor)


def _chain_(gradient: Tensor, v: Tensor, head: LinearHead) -> Tensor:
    """`gradient *= dz/dx` in place."""
    if head.softcap is not None:
        gradient.mul_(1 - (v / head.softcap) ** 2)
    if head.logit_scale != 1.0:
        gradient.mul_(head.logit_scale)
    return gradient


def _targets_in(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, slot) of every slot whose target is in the tile."""
    columns = tile.targets - tile.first_column
    slots = ((columns >= 0) & (columns < tile.logits.shape[1])).nonzero().squeeze(1)
    rows = torch.bucketize(slots, tile.offsets[1:], right=True)
    return rows, columns[slots], slots
