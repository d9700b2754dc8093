"""Ranking losses over sequence scores.

Tuna's loss over a group of candidates (arXiv 2310.13385, equation 3, and the released code)::

    sum over pairs with rank_i < rank_j of max(0, margin * (rank_j - rank_i) - (s_i - s_j))

It is piecewise linear in the scores, so its gradient has a closed form: every pair with a positive hinge subtracts
its weight from the better candidate's gradient and adds it to the worse one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tuna_kernels.loss_counts import LossCounts, ranked_pairs

Reduction = Literal["mean_groups", "mean_per_lag"]
Kind = Literal["tuna"]
Preset = Literal["paper", "released"]
REDUCTION_OF: dict[Preset, Reduction] = {"paper": "mean_groups", "released": "mean_per_lag"}


def tuna_hinge(
    scores: Tensor,
    ranks: Tensor,
    group_offsets: Tensor,
    *,
    margin: float,
    reduction: Reduction,
    groups: int,
    pairs_by_lag: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The Tuna loss of some groups and its gradient with respect to each score, in float64, without autograd.

    `groups` and `pairs_by_lag` are those of the whole optimizer step, so that the losses of micro-batches add up.

    Returns:
        `(loss, gradient)`: a float64 scalar and float64 [C].

    Raises:
        ValueError: `reduction="mean_per_lag"` and a pair whose lag has no count in `pairs_by_lag`.
    """
    better, worse = ranked_pairs(ranks, group_offsets)
    lag = ranks[worse] - ranks[better]
    exact = scores.detach().double()
    if reduction == "mean_groups":
        pair_weight = torch.full_like(lag, 1.0 / max(groups, 1), dtype=torch.float64)
    else:
        counted = torch.tensor([0, *pairs_by_lag], dtype=torch.float64, device=lag.device)
        if lag.numel() and (int(lag.max()) >= counted.numel() or bool((counted[lag] == 0).any())):
            raise ValueError(
                f"counts.pairs_by_lag = {tuple(pairs_by_lag)} has no pairs for some rank difference "
                f"of the ranks (largest: {int(lag.max())})"
            )
        pair_weight = counted[lag].reciprocal()
    hinge = margin * lag.double() - (exact[better] - exact[worse])
    open_weight = torch.where(hinge > 0, pair_weight, 0.0)
    # NaN scores must give a NaN loss, never a plausible number: clamp keeps NaN, the comparison above does not.
    loss = (hinge.clamp(min=0) * pair_weight).sum()
    gradient = torch.zeros_like(exact).index_add(0, worse, open_weight).index_add_(0, better, -open_weight)
    return loss, gradient


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    group_offsets: Tensor,
    *,
    kind: Kind = "tuna",
    reduction: Reduction = "mean_groups",
    counts: LossCounts | None = None,
    margin: float = 0.1,
) -> Tensor:
    """Ranking loss over the sequence scores of grouped candidates.

    Args:
        scores: [C] floating point, higher = more likely; differentiable.
        ranks: [C] int64, dense within a group, 0 = best, equal = tie (ties form no pairs).
        group_offsets: [G+1] int64; group g has candidates `group_offsets[g]:group_offsets[g+1]`.
        kind: `"tuna"`.
        reduction: `"mean_groups"` (the paper): sum over a group's pairs, mean over groups, including groups without a
            pair. `"mean_per_lag"` (the released code): for each rank difference the mean over all
            pairs with that difference in the batch, then the sum over differences.
        counts: denominators of the whole optimizer step; by default those of the given ranks.
        margin: required score gap per unit of rank difference.

    Returns:
        A scalar: float64 for float64 scores, else float32.

    Raises:
        ValueError: unknown `kind` or `reduction`; shapes that do not match; counts that miss a pair.
        TypeError: `scores` not floating point, `ranks` or `group_offsets` not int64.

    Examples:
        >>> scores = torch.tensor([-1.0, -0.5], requires_grad=True)
        >>> ranking_loss(scores, torch.tensor([0, 1]), torch.tensor([0, 2])).item()  # 0.1 - (-1.0 + 0.5)
        0.6000000238418579
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind = {kind!r} is not one of {get_args(Kind)}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction = {reduction!r} is not one of {get_args(Reduction)}")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    for name, tensor in (("ranks", ranks), ("group_offsets", group_offsets)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")
    if scores.ndim != 1 or ranks.shape != scores.shape:
        raise ValueError(f"scores {list(scores.shape)} and ranks {list(ranks.shape)} must both be [C]")
    if group_offsets.ndim != 1 or group_offsets.numel() < 1:
        raise ValueError(f"group_offsets must be [G+1], got {list(group_offsets.shape)}")
    groups, pairs = (-1, ()) if counts is None else (counts.groups, counts.pairs_by_lag)
    loss: Tensor = torch.ops.tuna_kernels.ranking_loss(
        scores, ranks, group_offsets, margin, reduction, groups, list(pairs)
    )[0]
    return loss


@dataclass(frozen=True)
class PresetSettings:
    """Settings of Tuna's total loss."""

    preset: Preset
    margin: float
    length_penalty: float
    mle_weight: float


@dataclass(frozen=True)
class PresetResult:
    """Loss parts of some groups (float64 scalars), their scores [C] and dL/dlogprob [M] (float64)."""

    ranking: Tensor
    mle: Tensor
    scores: Tensor
    grad_logprobs: Tensor


def preset_loss(
    logprobs: Tensor,
    candidate_offsets: Tensor,
    ranks: Tensor,
    group_offsets: Tensor,
    settings: PresetSettings,
    counts: LossCounts,
) -> PresetResult:
    """Tuna's total loss `ranking + mle_weight * mle` of some groups, and its closed-form gradient per slot.

    In the preset `paper` the MLE term is the mean over groups of the token mean of each group's first best
    candidate; in `released` it is the token mean over all candidates of the batch.
    """
    lengths = candidate_offsets.diff()
    candidate = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)
    exact = logprobs.detach().double()
    sums = torch.zeros(lengths.numel(), dtype=torch.float64, device=exact.device).index_add(0, candidate, exact)
    penalty = lengths.double() ** settings.length_penalty
    scores = sums / penalty
    # Which hinges are positive is decided by the scores in the caller's dtype.
    visible = scores.to(logprobs.dtype)
    ranking, gradient = tuna_hinge(
        visible,
        ranks,
        group_offsets,
        margin=settings.margin,
        reduction=REDUCTION_OF[settings.preset],
        groups=counts.groups,
        pairs_by_lag=counts.pairs_by_lag,
    )
    if settings.preset == "paper":
        best = first_best(ranks, group_offsets)
        mle_gradient = torch.zeros_like(scores)
        mle_gradient[best] = -1.0 / (lengths[best].double() * max(counts.groups, 1))
    else:
        mle_gradient = torch.full_like(scores, -1.0 / max(counts.tokens, 1))
    # A candidate without MLE weight may have a log-probability of -inf, and 0 * -inf is not 0.
    mle = torch.where(mle_gradient == 0, 0, mle_gradient * sums).sum()
    per_candidate = gradient / penalty + settings.mle_weight * mle_gradient
    return PresetResult(ranking, mle, visible, per_candidate[candidate])


def weighted(term: Tensor, weight: float) -> Tensor:
    """`weight * term`, and 0 for weight 0 even if the term is infinite."""
    return weight * term if weight else torch.zeros_like(term)


def first_best(ranks: Tensor, group_offsets: Tensor) -> Tensor:
    """[G'] the first candidate with rank 0 of every group that has one."""
    sizes = group_offsets.diff()
    group = torch.arange(sizes.numel(), device=ranks.device).repeat_interleave(sizes)
    none = ranks.numel()
    place = torch.where(ranks == 0, torch.arange(none, device=ranks.device), none)
    first = torch.full_like(sizes, none).scatter_reduce_(0, group, place, "amin")
    return first[first < none]
