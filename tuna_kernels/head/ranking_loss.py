"""Tuna's total loss from hidden states, without full logits and without recomputing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from tuna_kernels.arguments import compute_dtype, should_validate
from tuna_kernels.dispatch import resolve_backend
from tuna_kernels.head import reference
from tuna_kernels.head.logprobs import check_head, check_index, check_range, low_rank_pair
from tuna_kernels.head.tiled_linear import LinearCall
from tuna_kernels.loss_counts import LossCounts
from tuna_kernels.losses import (
    REDUCTION_OF,
    Kind,
    Preset,
    PresetSettings,
    first_best,
    preset_loss,
    ranking_loss,
    weighted,
)
from tuna_kernels.scores import sequence_scores
from tuna_kernels.tree import PackedTree

# Keeping logits saves a quarter of the flops and costs one more pass over vocabulary-sized float32 gradients for every
# part of the batch that fits. On a GPU it pays from about 1200 rows per part (docs/gpu.md): 1 GiB is 2000 at V = 128k.
LOGITS_BUDGET = {"cpu": 128 << 20, "cuda": 1 << 30}


def default_logits_budget(device: torch.device) -> int:
    """Default `logits_budget` of `linear_ranking_loss` in bytes."""
    return LOGITS_BUDGET.get(device.type, LOGITS_BUDGET["cpu"])


@dataclass(frozen=True)
class RankingLossOutput:
    """Loss of a packed tree and its parts.

    Attributes:
        loss: scalar, `ranking + mle_weight * mle`; differentiable. Everything else is detached.
        ranking: scalar, the ranking term.
        mle: scalar, the negative log-likelihood term.
        scores: [C] length-normalised log-probability of each candidate.
        logprobs: [M] log-probability of each slot.
        active: [C] bool, whether the candidate has any gradient (ranking and MLE together).
    """

    loss: Tensor
    ranking: Tensor
    mle: Tensor
    scores: Tensor
    logprobs: Tensor
    active: Tensor


def linear_ranking_loss(
    hidden: Tensor,
    weight: Tensor,
    tree: PackedTree,
    *,
    kind: Kind = "tuna",
    preset: Preset = "paper",
    margin: float = 0.1,
    length_penalty: float = 1.0,
    mle_weight: float = 1.0,
    counts: LossCounts | None = None,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_budget: int | None = None,
    backend: str = "auto",
) -> RankingLossOutput:
    """Tuna's total loss over the groups of a packed tree, from the trunk's hidden states.

    Processes a few groups at a time: within `logits_budget` bytes their logits are kept, so that scores, loss and
    gradients come from one block (as many products as the baseline loss, without its memory); a group beyond the
    budget is recomputed. Gradients are computed in the forward and returned by the backward; a second backward
    (`retain_graph`) recomputes them.

    Args:
        hidden: [T, D] final hidden states of the tree's rows.
        weight: [V, D] LM head.
        tree: the packed groups, on the device of `hidden`.
        kind: `"tuna"`.
        preset: `"paper"` or `"released"` (docs/numerics.md): the reduction over pairs and the MLE term.
        margin: required score gap per unit of rank difference.
        length_penalty: score = sum of log-probabilities / length ** length_penalty.
        mle_weight: weight of the MLE term.
        counts: denominators of the whole optimizer step; by default those of this tree.
        bias: [V], as in `linear_logprobs`.
        lora: `(A, B, scale)`, as in `linear_logprobs`.
        logit_scale: as in `linear_logprobs`.
        softcap: as in `linear_logprobs`.
        logits_budget: maximum bytes of logits to keep; default 128 MiB, on CUDA 1 GiB; 0 always recomputes.
        backend: as in `linear_logprobs`.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `linear_logprobs`; also an unknown
            `kind` or `preset`, a tree whose length differs from `hidden`, counts that miss a pair.

    Examples:
        >>> from tuna_kernels import Group, pack_groups
        >>> tree = pack_groups([Group(prompt=[0], responses=[[1], [2]], ranks=[0, 1])])
        >>> out = linear_ranking_loss(torch.zeros(tree.num_tokens, 2), torch.zeros(3, 2), tree)
        >>> round(out.ranking.item(), 4), round(out.mle.item(), 4)
        (0.1, 1.0986)
    """
    check_choices(kind, preset)
    dtypes = check_head(hidden, weight, bias, lora, logit_scale, softcap)
    if tree.num_tokens != hidden.shape[0]:
        raise ValueError(
            f"hidden {list(hidden.shape)} must have one row for each of the tree's {tree.num_tokens} tokens"
        )
    check_index("tree.targets", tree.targets, hidden.device)
    if should_validate(None, hidden):
        check_range("tree.targets", tree.targets, weight.shape[0], "the vocabulary")
    default = default_logits_budget(hidden.device)
    budget = default if logits_budget is None else logits_budget
    if budget < 0:
        raise ValueError(f"logits_budget = {budget} must not be negative")
    settings = PresetSettings(preset, margin, length_penalty, mle_weight)
    chosen = resolve_backend(backend, hidden.device, *dtypes)
    low_rank = low_rank_pair(hidden, lora, compute_dtype(*dtypes))
    head = _HeadTerms(bias, low_rank, float(logit_scale), None if softcap is None else float(softcap))
    if chosen == "reference":
        return _reference(hidden, weight, tree, head, settings, counts or tree.loss_counts())
    return _fused(hidden, weight, tree, head, settings, counts, budget, chosen)


@dataclass(frozen=True)
class _HeadTerms:
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None
    logit_scale: float
    softcap: float | None


def _fused(
    hidden: Tensor,
    weight: Tensor,
    tree: PackedTree,
    head: _HeadTerms,
    s: PresetSettings,
    counts: LossCounts | None,
    budget: int,
    backend: str,
) -> RankingLossOutput:
    low_hidden, low_weight = head.low_rank or (None, None)
    counts = counts or LossCounts(-1, (), 0)  # the op counts the given ranks
    call = LinearCall(hidden, weight, head.bias, low_hidden, low_weight, head.logit_scale, head.softcap)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in call.tensors]
    made = torch.ops.tuna_kernels.linear_ranking_loss(
        *call,
        rows=tree.rows,
        targets=tree.targets,
        candidate_offsets=tree.candidate_offsets,
        ranks=tree.ranks,
        group_offsets=tree.group_offsets,
        preset=s.preset,
        margin=s.margin,
        length_penalty=s.length_penalty,
        mle_weight=s.mle_weight,
        groups=counts.groups,
        pairs_by_lag=list(counts.pairs_by_lag),
        tokens=counts.tokens,
        logits_budget=budget,
        needs=needs,
        backend=backend,
    )
    loss, ranking, mle, scores, logprobs, grad_logprobs = (made[0], *(x.detach() for x in made[1:6]))
    return RankingLossOutput(loss, ranking, mle, scores, logprobs, active_candidates(grad_logprobs, tree))


def check_choices(kind: str, preset: str) -> None:
    """Check that the loss and the preset exist."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind = {kind!r} is not one of {get_args(Kind)}")
    if preset not in get_args(Preset):
        raise ValueError(f"preset = {preset!r} is not one of {get_args(Preset)}")


def active_candidates(grad_logprobs: Tensor, tree: PackedTree) -> Tensor:
    """[C] bool: whether any slot of the candidate has a nonzero gradient in `grad_logprobs` [M]."""
    slots = torch.arange(grad_logprobs.numel(), device=grad_logprobs.device)
    candidate = torch.bucketize(slots, tree.candidate_offsets[1:], right=True)
    counted = torch.zeros(tree.ranks.shape, dtype=torch.int64, device=grad_logprobs.device)
    return counted.index_add(0, candidate, (grad_logprobs != 0).long()) > 0


def _reference(
    hidden: Tensor, weight: Tensor, tree: PackedTree, head: _HeadTerms, s: PresetSettings, counts: LossCounts
) -> RankingLossOutput:
    """The reference, term by term, with plain autograd from full logits."""
    logprobs, *_ = reference.linear_logprobs(
        hidden,
        weight,
        tree.targets,
        tree.rows,
        head.bias,
        head.low_rank,
        ignore_index=-100,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        want_entropy=False,
    )
    scores = sequence_scores(logprobs, tree.candidate_offsets, length_penalty=s.length_penalty)
    ranking = ranking_loss(
        scores,
        tree.ranks,
        tree.group_offsets,
        reduction=REDUCTION_OF[s.preset],
        counts=counts,
        margin=s.margin,
    )
    if s.preset == "paper":
        means = sequence_scores(logprobs, tree.candidate_offsets)
        mle = -means[first_best(tree.ranks, tree.group_offsets)].sum() / max(counts.groups, 1)
    else:
        mle = -logprobs.sum() / max(counts.tokens, 1)
    closed = preset_loss(logprobs, tree.candidate_offsets, tree.ranks, tree.group_offsets, s, counts)
    active = active_candidates(closed.grad_logprobs, tree)
    loss = ranking + weighted(mle, s.mle_weight)
    return RankingLossOutput(loss, ranking.detach(), mle.detach(), scores.detach(), logprobs.detach(), active)
