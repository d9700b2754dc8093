"""`linear_logprobs` over the tile loop: from slots in the caller's order to gradients of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tuna_kernels.arguments import compute_dtype, dense_rows
from tuna_kernels.head.backend import HeadBackend
from tuna_kernels.head.slots import Slots
from tuna_kernels.head.tiled import ForwardResult, Gradients, Inputs, LinearHead, RowGradient


class LinearCall(NamedTuple):
    """The inputs of one call; the ops take these fields as arguments, in this order.

    Attributes:
        hidden: [T, D]; weight: [V, D]; bias: [V]; low_rank_hidden: [T, r]; low_rank_weight: [V, r].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low_rank_hidden: Tensor | None
    low_rank_weight: Tensor | None
    logit_scale: float
    softcap: float | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of `Needs` and `InputGradients`."""
        return self[:5]

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(*(t.dtype for t in self.tensors if t is not None))

    @property
    def inputs(self) -> Inputs:
        return Inputs(
            dense_rows(self.hidden),
            None if self.low_rank_hidden is None else dense_rows(self.low_rank_hidden),
        )

    @property
    def head(self) -> LinearHead:
        bias = None if self.bias is None else self.bias.to(self.compute).contiguous()
        low = None if self.low_rank_weight is None else dense_rows(self.low_rank_weight)
        return LinearHead(dense_rows(self.weight), bias, low, self.logit_scale, self.softcap)


class Needs(NamedTuple):
    """Which tensors of a `LinearCall` need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    low_rank_hidden: bool
    low_rank_weight: bool


class InputGradients(NamedTuple):
    """Gradients of the tensors of a `LinearCall`; empty if not needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    low_rank_hidden: Tensor
    low_rank_weight: Tensor


class LinearResult(NamedTuple):
    """Outputs of the forward, zero for ignored slots; entropy and unit may be empty."""

    logprobs: Tensor  # [M]
    lse: Tensor  # [M]
    entropy: Tensor  # [M]
    unit: Tensor  # [min(T, M), D]
    state: Tensor  # [3, M]


def forward(
    backend: HeadBackend,
    call: LinearCall,
    targets: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    *,
    want_entropy: bool,
    want_unit: bool,
) -> LinearResult:
    """Log-probabilities and what the backward needs."""
    slots = Slots.build(targets, rows, ignore_index)
    result = backend.forward(
        call.inputs, call.head, slots, call.compute, want_entropy=want_entropy, want_unit=want_unit
    )

    def per_slot(values: Tensor) -> Tensor:
        out = torch.zeros(targets.numel(), dtype=call.compute, device=targets.device)
        return out.index_copy_(0, slots.slots, values)

    new = result.logprobs.new_zeros
    entropy = new(0) if result.entropy is None else per_slot(result.entropy[slots.row_of])
    unit = new(min(call.hidden.shape[0], targets.numel()) if want_unit else 0, call.hidden.shape[1])
    if result.unit is not None:
        unit[: slots.rows.numel()] = result.unit
    state = state_of(slots, result, targets.numel())
    return LinearResult(per_slot(result.logprobs), per_slot(result.lse[slots.row_of]), entropy, unit, state)


def state_of(slots: Slots, result: ForwardResult, count: int) -> Tensor:
    """[3, M] (target_logit, maximum, log_sum) of `count` slots, 0 for ignored ones: the softmax for the backward,
    since lse itself would be too coarse for large logits."""
    values = torch.stack([result.target_logit, result.maximum[slots.row_of], result.log_sum[slots.row_of]])
    return values.new_zeros(3, count).index_copy_(1, slots.slots, values)


@dataclass(frozen=True)
class Saved:
    """What the forward kept for the backward, all [M] in the caller's slot order, and the upstream gradients.

    `entropy` and `unit` may be empty (not kept); upstream gradients may be None (zero).
    """

    entropy: Tensor
    unit: Tensor
    state: Tensor  # [3, M], of forward
    grad_logprobs: Tensor | None
    grad_lse: Tensor | None
    grad_entropy: Tensor | None


def row_gradient(slots: Slots, call: LinearCall, saved: Saved) -> tuple[Slots, Tensor, RowGradient]:
    """Drop the rows without upstream in any slot; compute the coefficients of the rest.

    Returns `(smaller slots, indices of their rows in the given slots, coefficients)`.
    """

    incoming = (saved.grad_logprobs, saved.grad_lse, saved.grad_entropy)
    # A compiled graph passes an empty gradient for an empty output that was not requested.
    given = [None if u is None or u.numel() != saved.state.shape[1] else u.to(call.compute) for u in incoming]
    active = torch.zeros(slots.slots.numel(), dtype=torch.bool, device=slots.slots.device)
    for u in given:
        if u is not None:
            active |= u[slots.slots] != 0
    slots, kept = slots.keep(active)
    g, g_lse, g_entropy = (None if u is None else u[slots.slots] for u in given)
    count = slots.slots.numel()
    zero = torch.zeros(count, dtype=call.compute, device=active.device)
    g = zero if g is None else g
    first_slot = slots.slots[slots.offsets[:-1]]  # every slot of a row has the row's lse and entropy
    softmax_weight = slots.row_sums((zero if g_lse is None else g_lse) - g)
    maximum, log_sum = saved.state[1:, first_slot]
    # A vocabulary shard may have no probability at all: no gradient flows through its softmax, so p must be 0.
    is_void = (log_sum == -torch.inf) & (softmax_weight == 0)
    maximum, log_sum = maximum.masked_fill(is_void, 0), log_sum.masked_fill(is_void, 0)
    has_entropy = g_entropy is not None and bool((g_entropy != 0).any())
    coefficients = RowGradient(
        maximum=maximum,
        log_sum=log_sum,
        softmax_weight=softmax_weight,
        entropy_weight=slots.row_sums(g_entropy) if has_entropy and g_entropy is not None else None,
        entropy=saved.entropy[first_slot] if has_entropy else None,
        slot_gradient=g,
    )
    return slots, kept, coefficients


def _times_slope(coefficients: RowGradient, call: LinearCall, target_logit: Tensor) -> RowGradient:
    """Multiply the slots' gradients by dz/dx at their targets; `target_logit` [S] is v there."""
    gradient = coefficients.slot_gradient * call.logit_scale
    if call.softcap is not None:
        gradient = gradient * (1 - (target_logit / call.softcap) ** 2)
    return coefficients._replace(slot_gradient=gradient)


def backward(
    backend: HeadBackend,
    call: LinearCall,
    targets: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    saved: Saved,
    needs: Needs,
    *,
    filter_eps: float = 0.0,
    main_grad: Tensor | None = None,
) -> InputGradients:
    """Gradients of the inputs. With `main_grad` [V, D] (compute type) the weight's is added to it, returned empty."""
    all_slots = Slots.build(targets, rows, ignore_index)
    slots, kept, coefficients = row_gradient(all_slots, call, saved)
    add = main_grad is not None

    def new(source: Tensor | None, wanted: bool, *, of_rows: bool = False) -> Tensor:
        """Zeros for rows, as some have no gradient; vocabulary-sized gradients are fully written, tile by tile, or,
        with a `main_grad`, added to zeros in the compute type."""
        if source is None or not wanted:
            return call.hidden.new_empty(0)
        if of_rows:
            return source.new_zeros(source.shape)
        return source.new_zeros(source.shape, dtype=call.compute) if add else source.new_empty(source.shape)

    results = InputGradients(
        hidden=new(call.hidden, needs.hidden, of_rows=True),
        weight=new(call.weight, needs.weight and not add),
        bias=new(call.bias, needs.bias),
        low_rank_hidden=new(call.low_rank_hidden, needs.low_rank_hidden, of_rows=True),
        low_rank_weight=new(call.low_rank_weight, needs.low_rank_weight),
    )
    if saved.unit.numel() and needs.hidden and not any(needs[1:]):
        of_targets = _times_slope(coefficients, call, saved.state[0, slots.slots])
        row_grads: Tensor | None = backend.unit_rows(call.head.weight, slots, saved.unit, kept, of_targets)
        low_rows = None
    else:
        count = slots.rows.numel()
        row_grads = row_grads_like(call.hidden, count, call.compute) if needs.hidden else None
        low_rows = None
        if needs.low_rank_hidden and call.low_rank_hidden is not None:
            low_rows = row_grads_like(call.low_rank_hidden, count, call.compute)
        into = Gradients(
            rows=row_grads,
            low_rank_rows=low_rows,
            weight=(main_grad if add else results.weight) if needs.weight else None,
            low_rank_weight=results.low_rank_weight if needs.low_rank_weight else None,
            bias=results.bias if needs.bias else None,
            accumulate=add,
            filter_eps=filter_eps,
        )
        backend.backward(call.inputs, call.head, slots, call.compute, coefficients, into)
    for result, grads in ((results.hidden, row_grads), (results.low_rank_hidden, low_rows)):
        if grads is not None:
            result.index_copy_(0, slots.rows, grads.to(result.dtype))
    if add and call.bias is not None:
        results = results._replace(bias=results.bias.to(call.bias.dtype))
    if add and call.low_rank_weight is not None:
        results = results._replace(low_rank_weight=results.low_rank_weight.to(call.low_rank_weight.dtype))
    return results


def row_grads_like(source: Tensor, rows: int, compute: torch.dtype) -> Tensor:
    """An uninitialized [rows, width of source] buffer in the compute type."""
    return source.new_empty(rows, source.shape[1], dtype=compute)
