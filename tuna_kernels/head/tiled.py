"""The tile loop: log-probabilities and their gradients without full logits.

Rows are processed `plan.rows` at a time, the vocabulary `plan.columns` at a time, vocabulary outermost, so that
each tile of the weight is converted to the compute type once and each tile of its gradient is completed at once.
A tile of logits is one matrix product; the operations on it are a `TileOps`, in torch operations or in C++.

Forward: 2·N·V·D flops; 4·N·V·D with the unit gradient (frozen weight). Backward: 6·N·V·D (recomputing), 4·N·V·D if the
logits were kept in a block, N·D with the unit gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tuna_kernels.head.products import MIN_ROWS, Products
from tuna_kernels.head.slots import Slots

SMALLEST_FACTOR = 1e-37  # not 0, so that -inf stays -inf


@dataclass(frozen=True)
class LinearHead:
    """The LM head: `z = softcap(logit_scale * (h W^T + h2 W2^T + bias))`.

    A row's statistics are in terms of v, where `z = factor * v`: with a softcap v = z, without one v is product plus
    bias, negated if the scale is negative. Differences of v are taken before multiplying, so that the rounding of z
    costs no accuracy for large or steep logits (docs/numerics.md).
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V] in the compute type
    low_rank_weight: Tensor | None  # [V, r]
    logit_scale: float
    softcap: float | None

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def factor(self) -> float:
        return max(abs(self.logit_scale), SMALLEST_FACTOR) if self.softcap is None else 1.0

    @property
    def sign(self) -> float:
        return -1.0 if self.softcap is None and self.logit_scale < 0 else 1.0


class Inputs(NamedTuple):
    """Hidden states [T, D] and, for a low-rank term of the head, [T, r]."""

    hidden: Tensor
    low_rank: Tensor | None


class SoftmaxState(NamedTuple):
    """Running online softmax of R rows and S slots."""

    maximum: Tensor  # [R] of v
    sum: Tensor  # [R] float64, of e^(z - largest z)
    weighted: Tensor | None  # [R] float64, for the entropy
    rescale: Tensor | None  # [R] if the tile is to be replaced by exponentials
    target_logit: Tensor  # [S] v of the targets


class RowGradient(NamedTuple):
    """Coefficients that turn logits into their gradient, for R rows and S slots (see csrc/cpu/head/tiles.h)."""

    maximum: Tensor  # [R] of v
    log_sum: Tensor  # [R] log-sum-exp minus the largest z
    softmax_weight: Tensor  # [R]
    entropy_weight: Tensor | None  # [R]
    entropy: Tensor | None  # [R]
    slot_gradient: Tensor  # [S] dL/dz of the target, without the softmax's part

    def part(self, rows: slice, slot_gradient: Tensor) -> RowGradient:
        """The coefficients of some of the rows."""
        weight = None if self.entropy_weight is None else self.entropy_weight[rows]
        entropy = None if self.entropy is None else self.entropy[rows]
        of_rows = self.maximum[rows], self.log_sum[rows], self.softmax_weight[rows]
        return RowGradient(*of_rows, weight, entropy, slot_gradient)


class Tile(NamedTuple):
    """A [rows, columns] view of logits that starts at vocabulary entry `first_column`, for `slots` of its rows."""

    logits: Tensor
    first_column: int
    bias: Tensor | None  # [columns]
    offsets: Tensor  # [rows+1]
    targets: Tensor  # [slots of the rows]


class TileOps(Protocol):
    """A backend's operations on one tile."""

    def load(self, out: Tensor, source: Tensor, index: Tensor | None) -> None:
        """`out[i] = source[index[i]]` (None: i), converted to the compute type."""

    def softmax(self, tile: Tile, head: LinearHead, state: SoftmaxState) -> None:
        """Merge the tile into the state; a softcap leaves z in the tile, `rescale` leaves exponentials."""

    def gradient(self, tile: Tile, head: LinearHead, gradient: RowGradient, *, is_capped: bool) -> None:
        """Replace the tile by dL/d(h W^T)."""

    def scale_rows(self, x: Tensor, factor: Tensor) -> None:
        """`x[i] *= factor[i]`."""

    def products(self, slots: Slots, compute: torch.dtype, hidden: torch.dtype, weight: torch.dtype) -> Products:
        """The matrix products of a call whose sources have these dtypes."""


@dataclass(frozen=True)
class TilePlan:
    """Tile sizes. They depend on V, D and dtypes only, never on the rows, and hence neither do a row's bits."""

    rows: int
    columns: int

    @classmethod
    def choose(cls, width: int, *, converts: bool) -> TilePlan:
        """About 8 MiB of logits, and at most 8 MiB of a float32 weight tile [columns, width] if the weight's dtype is
        not the compute type: its gradient, or a copy of it, is made one tile at a time."""
        columns = max(256, min(2048, (2 << 20) // width // 256 * 256)) if converts else 2048
        return cls(rows=1024, columns=columns)

    def chunk(self, rows: int) -> int:
        """Rows of a tile, given the total number of rows."""
        return min(self.rows, max(rows, MIN_ROWS))


class _Loop:
    """Iterates over the tiles of one call and owns its buffers."""

    def __init__(self, ops: TileOps, inputs: Inputs, head: LinearHead, slots: Slots, compute: torch.dtype) -> None:
        self.ops, self.inputs, self.head, self.slots, self.compute = ops, inputs, head, slots, compute
        types = {t.dtype for t in (*inputs, head.weight, head.low_rank_weight) if t is not None}
        shared = types.pop() if len(types) == 1 else compute
        self.products = ops.products(slots, compute, shared, head.weight.dtype)
        self.plan = TilePlan.choose(head.weight.shape[1], converts=head.weight.dtype != compute)
        self.device = inputs.hidden.device
        self.total = slots.rows.numel()
        self.chunk_rows = self.plan.chunk(self.total)
        bounds = [*range(0, self.total, self.chunk_rows), self.total]
        self.chunks = list(itertools.pairwise(bounds))
        # On the host: chunk c has the sorted slots slot_bounds[c]:slot_bounds[c + 1].
        self.slot_bounds = slots.offsets[torch.tensor(bounds, device=self.device)].tolist()
        self._logits: Tensor | None = None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.compute, device=self.device)

    def columns(self) -> Iterator[slice]:
        for first in range(0, self.head.vocabulary, self.plan.columns):
            yield slice(first, min(first + self.plan.columns, self.head.vocabulary))

    def logits(self, rows: slice, columns: slice, out: Tensor | None = None) -> Tensor:
        """[n, c] of h W^T + h2 W2^T, in `out` or in this loop's buffer."""
        n, width = rows.stop - rows.start, columns.stop - columns.start
        count = max(n, MIN_ROWS)
        if out is None or out.shape[0] < count:
            if self._logits is None:
                self._logits = self.empty(self.chunk_rows * self.plan.columns)
            product = self._logits[: count * width].view(count, width)
        else:
            product = out
        self.products.logits(product, self.inputs.hidden, rows, self.head.weight, columns, add=False)
        if self.inputs.low_rank is not None and self.head.low_rank_weight is not None:
            self.products.logits(product, self.inputs.low_rank, rows, self.head.low_rank_weight, columns, add=True)
        if out is not None and product is not out:
            out.copy_(product[:n])
            return out
        return product[:n]

    def tile(self, logits: Tensor, chunk: int, columns: slice) -> Tile:
        start, stop = self.chunks[chunk]
        low, high = self.slot_bounds[chunk], self.slot_bounds[chunk + 1]
        bias = None if self.head.bias is None else self.head.bias[columns]
        offsets = self.slots.offsets[start : stop + 1]
        return Tile(logits, columns.start, bias, offsets - low if low else offsets, self.slots.targets[low:high])

    def slots_of(self, chunk: int, values: Tensor) -> Tensor:
        return values[self.slot_bounds[chunk] : self.slot_bounds[chunk + 1]]


class ForwardResult(NamedTuple):
    """Results per row and per sorted slot, in the compute type; see `LinearHead` for v."""

    logprobs: Tensor  # [S]
    lse: Tensor  # [R]
    target_logit: Tensor  # [S] v of the targets
    maximum: Tensor  # [R] of v
    log_sum: Tensor  # [R] lse minus the largest z
    entropy: Tensor | None  # [R]
    unit: Tensor | None  # [R, D] sum over v of p_v dz_v/dx_v w_v


def forward(
    ops: TileOps,
    inputs: Inputs,
    head: LinearHead,
    slots: Slots,
    compute: torch.dtype,
    *,
    want_entropy: bool = False,
    want_unit: bool = False,
    block: Tensor | None = None,
) -> ForwardResult:
    """Log-probabilities of all slots.

    `block` [R, V] keeps the logits (after the softcap, if any) for `backward`.
    """
    loop = _Loop(ops, inputs, head, slots, compute)
    total = loop.total
    maximum = torch.full((total,), -torch.inf, dtype=compute, device=loop.device)
    sums = torch.zeros(total, dtype=torch.float64, device=loop.device)
    weighted = torch.zeros_like(sums) if want_entropy else None
    rescale = loop.empty(total) if want_unit else None
    # A target outside the vocabulary is never found by a tile: its log-probability stays NaN.
    target_logit = torch.full((slots.targets.numel(),), torch.nan, dtype=compute, device=loop.device)
    width = head.weight.shape[1]
    unit = torch.zeros(total, width, dtype=compute, device=loop.device) if want_unit else None
    for columns in loop.columns():
        for chunk, bounds in enumerate(loop.chunks):
            rows = slice(*bounds)
            kept = None if block is None else block[rows, columns]
            tile = loop.tile(loop.logits(rows, columns, kept), chunk, columns)
            state = SoftmaxState(
                maximum[rows],
                sums[rows],
                None if weighted is None else weighted[rows],
                None if rescale is None else rescale[rows],
                loop.slots_of(chunk, target_logit),
            )
            ops.softmax(tile, head, state)
            if unit is not None and state.rescale is not None:
                ops.scale_rows(unit[rows], state.rescale)
                loop.products.add_to_rows(unit[rows], tile.logits, head.weight, columns)
    log_sum = sums.log()
    entropy = None if weighted is None else (log_sum - weighted / sums).to(compute)
    if unit is not None:
        ops.scale_rows(unit, sums.reciprocal().to(compute))
    return result_of(head, slots.row_of, target_logit, maximum, log_sum, entropy, unit)


def result_of(
    head: LinearHead,
    row_of: Tensor | slice,
    target_logit: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None = None,
    unit: Tensor | None = None,
) -> ForwardResult:
    """Log-probs and log-sum-exp in float64, the maximum subtracted before multiplying, then rounded."""
    compute = maximum.dtype
    logprobs = head.factor * (target_logit.double() - maximum.double()[row_of]) - log_sum[row_of]
    lse = head.factor * maximum.double() + log_sum
    return ForwardResult(
        logprobs.to(compute), lse.to(compute), target_logit, maximum, log_sum.to(compute), entropy, unit
    )


@dataclass(frozen=True)
class Gradients:
    """Output buffers of gradients, None if not needed. Row gradients are for the rows of the given slots."""

    rows: Tensor | None  # [R, D] compute type, overwritten
    low_rank_rows: Tensor | None  # [R, r]
    weight: Tensor | None  # [V, D] any floating type
    low_rank_weight: Tensor | None  # [V, r]
    bias: Tensor | None  # [V]
    accumulate: bool = False  # add to weight, low_rank_weight and bias (compute type) instead of overwriting
    filter_eps: float = 0.0  # vocabulary entries whose dL/dlogit is below this in every row may be skipped

    @property
    def any(self) -> bool:
        return bool(self.of_rows or self.of_vocabulary)

    @property
    def of_rows(self) -> list[Tensor]:
        return [t for t in (self.rows, self.low_rank_rows) if t is not None]

    @property
    def of_vocabulary(self) -> list[Tensor]:
        return [t for t in (self.weight, self.low_rank_weight, self.bias) if t is not None]

    def row_products(self, head: LinearHead) -> list[tuple[Tensor, Tensor]]:
        """(gradient, weight): `gradient += dL/dlogits weight`, over the whole vocabulary."""
        pairs = (self.rows, head.weight), (self.low_rank_rows, head.low_rank_weight)
        return [(out, weight) for out, weight in pairs if out is not None and weight is not None]

    def weight_products(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """(gradient, source): `gradient (+)= dL/dlogits^T source`, over all rows."""
        pairs = (self.weight, inputs.hidden), (self.low_rank_weight, inputs.low_rank)
        return [(out, source) for out, source in pairs if out is not None and source is not None]


def backward(
    ops: TileOps,
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
    """Fill `into`: recompute each tile of logits (or read it from `block`), turn it into its gradient, multiply.

    `block_rows` [R]: the rows of `block` that belong to `slots` (None: all, in order).
    """
    if not into.any:
        return
    loop = _Loop(ops, inputs, head, slots, compute)
    for buffer in into.of_rows:
        buffer.zero_()
    for columns in loop.columns():
        writer = GradientWriter(loop, into, columns)
        for chunk, bounds in enumerate(loop.chunks):
            rows = slice(*bounds)
            if block is None:
                logits = loop.logits(rows, columns)
            elif block_rows is None:
                logits = block[rows, columns]
            else:
                logits = loop.empty(rows.stop - rows.start, columns.stop - columns.start)
                ops.load(logits, block[:, columns], block_rows[rows])
            of_chunk = gradient.part(rows, loop.slots_of(chunk, gradient.slot_gradient))
            ops.gradient(loop.tile(logits, chunk, columns), head, of_chunk, is_capped=block is not None)
            writer.add(logits, rows)
        writer.finish()


class GradientWriter:
    """Multiplies the gradient tiles of one vocabulary range into the requested gradients."""

    def __init__(self, loop: _Loop, into: Gradients, columns: slice) -> None:
        self.loop, self.into, self.columns = loop, into, columns
        self.add_to = into.accumulate  # otherwise the first product overwrites and later ones add
        self.tiles = replace(
            into,
            weight=self._tile(into.weight),
            low_rank_weight=self._tile(into.low_rank_weight),
            bias=self._tile(into.bias),
        )

    def _tile(self, target: Tensor | None) -> Tensor | None:
        """A compute-type tile of a vocabulary-sized gradient: a view if the gradient has that dtype."""
        if target is None:
            return None
        tile = target[self.columns]
        if tile.dtype != self.loop.compute:
            tile = self.loop.empty(*tile.shape)
        return tile if self.loop.chunks else tile.zero_()

    def add(self, gradient: Tensor, rows: slice) -> None:
        loop, bias = self.loop, self.tiles.bias
        for out, weight in self.into.row_products(loop.head):
            loop.products.add_to_rows(out[rows], gradient, weight, self.columns)
        for out, source in self.tiles.weight_products(loop.inputs):
            loop.products.to_weight(out, gradient, source, rows, add=self.add_to)
        if bias is not None:
            torch.add(gradient.sum(0), bias if self.add_to else 0, out=bias)
        self.add_to = True

    def finish(self) -> None:
        """Write tiles held in a separate buffer, converted to the gradient's dtype."""
        for tile, target in zip(self.tiles.of_vocabulary, self.into.of_vocabulary, strict=True):
            if tile.dtype != target.dtype:
                target[self.columns].copy_(tile)


UNIT_SLOTS = 1024


def unit_rows(weight: Tensor, slots: Slots, unit: Tensor, places: Tensor, gradient: RowGradient) -> Tensor:
    """Gradient of hidden rows from their unit gradients `unit[places]`: one weight row per slot, no logits.

    `dL/dh_r = softmax_weight_r * unit_r + sum over its slots of slot_gradient * w_target`, and `slot_gradient`
    here is dL/d(h W^T) of the target.
    """
    weight_of_row = gradient.softmax_weight.unsqueeze(1)
    result = torch.where(
        weight_of_row == 0, 0, unit[places] * weight_of_row
    )  # without any probability the unit gradient is NaN
    for start in range(0, slots.slots.numel(), UNIT_SLOTS):
        part = slice(start, start + UNIT_SLOTS)
        rows = weight.index_select(0, slots.targets[part]).to(unit.dtype)
        rows.mul_(gradient.slot_gradient[part].unsqueeze(1))
        result.index_add_(0, slots.row_of[part], rows)
    return result
