"""`linear_ranking_loss` over the tile loop, a few groups at a time.

Within a byte budget the logits of some groups are kept in one block, from which scores, loss, their closed-form
gradient and the gradients of those groups are computed: three products, as many as the baseline loss, without its
memory. A group whose logits alone exceed the budget is recomputed instead (four products).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tuna_kernels.head.backend import HeadBackend
from tuna_kernels.head.products import MIN_ROWS
from tuna_kernels.head.slots import Slots
from tuna_kernels.head.tiled import ForwardResult, Gradients
from tuna_kernels.head.tiled_linear import (
    InputGradients,
    LinearCall,
    Needs,
    Saved,
    row_gradient,
    row_grads_like,
    state_of,
)
from tuna_kernels.loss_counts import LossCounts
from tuna_kernels.losses import PresetSettings, preset_loss, weighted


@dataclass(frozen=True)
class Candidates:
    """The tree's slots and candidates (see tree.PackedTree): offsets and ranks on the host."""

    rows: Tensor  # [M]
    targets: Tensor  # [M]
    candidate_offsets: Tensor  # [C+1]
    ranks: Tensor  # [C]
    group_offsets: Tensor  # [G+1]


class RankingResult(NamedTuple):
    """The loss and its parts (scalars), per-candidate and per-slot results, and the gradients for a `grad_loss` of 1,
    all in the compute type; gradients are empty if not needed."""

    loss: Tensor
    ranking: Tensor
    mle: Tensor
    scores: Tensor  # [C]
    logprobs: Tensor  # [M]
    grad_logprobs: Tensor  # [M]
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_low_rank_hidden: Tensor
    grad_low_rank_weight: Tensor

    @property
    def gradients(self) -> InputGradients:
        return InputGradients(*self[6:])


@dataclass(frozen=True)
class _Part:
    """Some neighbouring groups, with their candidates and slots; their logits are kept or recomputed."""

    groups: slice
    candidates: slice
    slots: slice
    keep: bool


def _parts(candidates: Candidates, vocabulary: int, itemsize: int, budget: int) -> Iterator[_Part]:
    """Greedy runs of groups whose slots (an upper bound of their rows) fit the budget.

    All consecutive groups beyond the budget are recomputed together: this takes no memory that grows with their
    number, and passes over vocabulary-sized gradients once.
    """
    capacity = budget // max(1, itemsize * vocabulary)
    group_offsets = candidates.group_offsets.tolist()
    slot_offsets = candidates.candidate_offsets[candidates.group_offsets].tolist()
    first, groups = 0, len(group_offsets) - 1

    def fits(first: int, last: int) -> bool:
        slots: int = slot_offsets[last] - slot_offsets[first]
        return max(slots, MIN_ROWS) <= capacity

    while first < groups:
        last, keep = first + 1, fits(first, first + 1)
        while last < groups and (fits(first, last + 1) if keep else not fits(last, last + 1)):
            last += 1
        slots = slice(slot_offsets[first], slot_offsets[last])
        yield _Part(slice(first, last), slice(group_offsets[first], group_offsets[last]), slots, keep)
        first = last


def linear_ranking(
    backend: HeadBackend,
    call: LinearCall,
    candidates: Candidates,
    settings: PresetSettings,
    counts: LossCounts,
    needs: Needs,
    logits_budget: int,
) -> RankingResult:
    """Loss and gradients (for a `grad_loss` of 1) of all groups."""
    compute, device = call.compute, call.hidden.device
    slot_count = candidates.targets.numel()
    logprobs = torch.zeros(slot_count, dtype=compute, device=device)
    grad_logprobs = torch.zeros_like(logprobs)
    scores = torch.zeros(candidates.ranks.numel(), dtype=compute, device=device)
    ranking = torch.zeros((), dtype=torch.float64, device=device)
    mle = torch.zeros_like(ranking)
    gradients = _new_gradients(call, needs)
    started = False
    parts = list(_parts(candidates, call.weight.shape[0], compute.itemsize, logits_budget))
    largest = max((p.slots.stop - p.slots.start for p in parts if p.keep), default=0)
    keeps = largest > 0 and gradients.any
    block = torch.empty(max(largest, MIN_ROWS) * call.weight.shape[0] if keeps else 0, dtype=compute, device=device)
    inputs, head = call.inputs, call.head
    for part in parts:
        slots = Slots.build(candidates.targets[part.slots], candidates.rows[part.slots], ignore_index=-1)
        rows = slots.rows.numel()
        kept = block[: rows * head.vocabulary].view(rows, head.vocabulary) if part.keep and keeps else None
        result = backend.forward(inputs, head, slots, compute, block=kept)
        logprobs[part.slots] = torch.empty_like(result.logprobs).index_copy_(0, slots.slots, result.logprobs)
        of_part = preset_loss(
            logprobs[part.slots],
            candidates.candidate_offsets[part.candidates.start : part.candidates.stop + 1] - part.slots.start,
            candidates.ranks[part.candidates],
            candidates.group_offsets[part.groups.start : part.groups.stop + 1] - part.candidates.start,
            settings,
            counts,
        )
        ranking += of_part.ranking
        mle += of_part.mle
        scores[part.candidates] = of_part.scores
        grad_logprobs[part.slots] = of_part.grad_logprobs.to(compute)
        if gradients.any:
            saved = _saved(slots, result, grad_logprobs[part.slots])
            started |= _add_gradients(backend, call, slots, saved, kept, replace(gradients, accumulate=started))
    if not started:
        for unwritten in (gradients.weight, gradients.low_rank_weight, gradients.bias):
            if unwritten is not None:
                unwritten.zero_()
    loss = ranking + weighted(mle, settings.mle_weight)
    none = logprobs.new_empty(0)
    return RankingResult(
        loss=loss.to(compute),
        ranking=ranking.to(compute),
        mle=mle.to(compute),
        scores=scores,
        logprobs=logprobs,
        grad_logprobs=grad_logprobs,
        grad_hidden=none if gradients.rows is None else gradients.rows,
        grad_weight=none.clone() if gradients.weight is None else gradients.weight,
        grad_bias=none.clone() if gradients.bias is None else gradients.bias,
        grad_low_rank_hidden=none.clone() if gradients.low_rank_rows is None else gradients.low_rank_rows,
        grad_low_rank_weight=none.clone() if gradients.low_rank_weight is None else gradients.low_rank_weight,
    )


def _saved(slots: Slots, result: ForwardResult, grad_logprobs: Tensor) -> Saved:
    empty = grad_logprobs.new_empty(0)
    return Saved(empty, empty, state_of(slots, result, grad_logprobs.numel()), grad_logprobs, None, None)


def _new_gradients(call: LinearCall, needs: Needs) -> Gradients:
    """Buffers in the compute type: parts of the batch are summed before rounding. Row gradients start at zero;
    vocabulary-sized ones (weight, low-rank weight, bias) are fully written by the first part that has any."""

    def new(source: Tensor | None, wanted: bool, *, of_rows: bool = False) -> Tensor | None:
        if source is None or not wanted:
            return None
        make = torch.zeros if of_rows else torch.empty
        return make(source.shape, dtype=call.compute, device=source.device)

    return Gradients(
        rows=new(call.hidden, needs.hidden, of_rows=True),
        low_rank_rows=new(call.low_rank_hidden, needs.low_rank_hidden, of_rows=True),
        weight=new(call.weight, needs.weight),
        low_rank_weight=new(call.low_rank_weight, needs.low_rank_weight),
        bias=new(call.bias, needs.bias),
    )


def _add_gradients(
    backend: HeadBackend, call: LinearCall, slots: Slots, saved: Saved, block: Tensor | None, total: Gradients
) -> bool:
    """Add one part's gradients, from its kept block or by recomputing its logits; returns whether it has any."""
    every_row = slots.rows.numel()
    slots, kept, coefficients = row_gradient(slots, call, saved)
    count = slots.rows.numel()
    if count == 0:
        return False
    of_part = replace(
        total,
        rows=None if total.rows is None else row_grads_like(total.rows, count, call.compute),
        low_rank_rows=None if total.low_rank_rows is None else row_grads_like(total.low_rank_rows, count, call.compute),
    )
    block_rows = None if count == every_row else kept
    backend.backward(
        call.inputs,
        call.head,
        slots,
        call.compute,
        coefficients,
        of_part,
        block=block,
        block_rows=block_rows,
    )
    for target, part in ((total.rows, of_part.rows), (total.low_rank_rows, of_part.low_rank_rows)):
        if target is not None and part is not None:
            target.index_add_(0, slots.rows, part)
    return True
