"""Ranking metrics and loss from scores: numpy in float64, on the host.

The results of a batch are a few numbers per candidate, so they are kept (`ScoredGroups`), joined over batches and
ranks, and reduced to metrics once: metrics are over all groups together and do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tuna_kernels import ranking_loss
from tuna_kernels.losses import REDUCTION_OF, Preset

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoredGroups:
    """A model's scores of some groups.

    Attributes:
        scores: [C] float64, length-normalised scores.
        logprob_sums: [C] float64, sum of a response's token log-probabilities (nats).
        lengths: [C] int64, response tokens.
        ranks: [C] int64, dense within a group, 0 = best, equal = tie.
        group_offsets: [G+1] int64.
    """

    scores: FloatArray
    logprob_sums: FloatArray
    lengths: IntArray
    ranks: IntArray
    group_offsets: IntArray

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return len(self.group_offsets) - 1

    @classmethod
    def concatenate(cls, parts: Sequence[ScoredGroups]) -> ScoredGroups:
        """All groups of `parts`, in order; no groups if there are no parts."""
        sizes = [np.diff(part.group_offsets) for part in parts]
        return cls(
            scores=np.concatenate([np.empty(0), *(part.scores for part in parts)]),
            logprob_sums=np.concatenate([np.empty(0), *(part.logprob_sums for part in parts)]),
            lengths=np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)]),
            ranks=np.concatenate([np.empty(0, np.int64), *(part.ranks for part in parts)]),
            group_offsets=np.concatenate([[0], *sizes]).cumsum().astype(np.int64),
        )

    def select(self, groups: npt.ArrayLike) -> ScoredGroups:
        """The groups with these indices, in the order given."""
        chosen = np.asarray(groups, dtype=np.int64)
        sizes = np.diff(self.group_offsets)[chosen]
        offsets = np.concatenate([[0], sizes.cumsum()]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
        index = np.repeat(self.group_offsets[:-1][chosen], sizes) + within
        return ScoredGroups(
            self.scores[index], self.logprob_sums[index], self.lengths[index], self.ranks[index], offsets
        )


def ranking_metrics(scored: ScoredGroups) -> dict[str, float]:
    """Agreement of the scores with the ranks given.

    A *pair* is two candidates of one group with different ranks; tied candidates make none. Equal scores
    never count as correct: a model that gives every candidate the same score has accuracy 0 and top-1 0, not
    one half.

    * `rank/accuracy`: fraction of all pairs whose better candidate has the strictly higher score.
    * `rank/top1`: fraction of ranked groups (those with a pair) in which some best candidate scores strictly above
      every candidate that is not best.
    * `rank/kendall`: mean over ranked groups of (correct pairs - wrong pairs) / pairs; pairs of equal scores are
      neither.
    * `margin/mean`: mean over all pairs of the better minus the worse score.
    * `logps/rank_r`: mean over the candidates of rank r of the mean token log-probability (nats).

    Returns:
        The metrics by name; the first four are omitted if there is no pair.
    """
    pairs = right = top1 = 0
    gap = kendall = 0.0
    ranked_groups = 0
    for index in _same_size(scored.group_offsets):
        s, r = scored.scores[index], scored.ranks[index]  # [n, k]
        ordered = r[:, :, None] < r[:, None, :]  # [n, k, k]: row better than column
        gaps = np.where(ordered, s[:, :, None] - s[:, None, :], 0.0)
        in_group = ordered.sum((1, 2))
        has_pair = in_group > 0
        best_score = np.where(r == 0, s, -np.inf).max(1)
        rest_score = np.where(r == 0, -np.inf, s).max(1)
        balance = ((gaps > 0).sum((1, 2)) - (gaps < 0).sum((1, 2)))[has_pair]
        pairs += int(in_group.sum())
        ranked_groups += int(has_pair.sum())
        right += int((gaps > 0).sum())
        top1 += int(((best_score > rest_score) & has_pair).sum())
        kendall += float((balance / in_group[has_pair]).sum())
        gap += float(gaps.sum())
    metrics: dict[str, float] = {}
    if pairs:
        metrics["rank/accuracy"] = right / pairs
        metrics["rank/top1"] = top1 / ranked_groups
        metrics["rank/kendall"] = kendall / ranked_groups
        metrics["margin/mean"] = gap / pairs
    return metrics | _logprobs_by_rank(scored)


def greater_is_better(metric: str) -> bool:
    """Whether a higher value of a metric is better, by its name (with or without `eval_` and a dataset's name).

    Raises:
        ValueError: an unknown metric.

    Examples:
        >>> greater_is_better("loss/rank"), greater_is_better("eval_test_rank/accuracy")
        (False, True)
    """
    if metric.endswith(("loss", "loss/rank", "loss/mle")):
        return False
    if metric.endswith(("rank/accuracy", "rank/top1", "rank/kendall", "margin/mean", "logps/rank_0")):
        return True
    raise ValueError(
        f"metric_for_best_model = {metric!r} is not one of loss, loss/rank, loss/mle, rank/accuracy, rank/top1, "
        "rank/kendall, margin/mean; for another metric set greater_is_better too"
    )


@dataclass(frozen=True)
class LossParts:
    """`loss = ranking + mle_weight * mle` of some groups as one batch."""

    loss: float
    ranking: float
    mle: float


def loss_parts(
    scored: ScoredGroups, *, preset: Preset = "paper", margin: float = 0.1, mle_weight: float = 1.0
) -> LossParts:
    """The training loss of all groups as one batch, from their scores alone, under either preset (docs/numerics.md).

    Raises:
        ValueError: an unknown preset, or no groups.
    """
    if preset not in REDUCTION_OF:
        raise ValueError(f"preset = {preset!r} is not one of {tuple(REDUCTION_OF)}")
    if scored.num_groups == 0:
        raise ValueError("scored has no groups, and without groups the loss is undefined")
    ranking = ranking_loss(
        torch.from_numpy(scored.scores),
        torch.from_numpy(scored.ranks),
        torch.from_numpy(scored.group_offsets),
        reduction=REDUCTION_OF[preset],
        margin=margin,
    ).item()
    if preset == "released":
        mle = -float(scored.logprob_sums.sum() / scored.lengths.sum())
    else:
        best = _first_best(scored)
        mle = -float((scored.logprob_sums[best] / scored.lengths[best]).mean())
    return LossParts(ranking + mle_weight * mle, ranking, mle)


def _same_size(group_offsets: IntArray) -> Iterator[IntArray]:
    """For each group size k: candidate indices [n, k] of the n groups of that size."""
    sizes = np.diff(group_offsets)
    for size in np.unique(sizes):
        yield group_offsets[:-1][sizes == size][:, None] + np.arange(size)


def _first_best(scored: ScoredGroups) -> IntArray:
    """Index [G] of the first rank-0 candidate of each group."""
    best = np.flatnonzero(scored.ranks == 0)
    return best[np.searchsorted(best, scored.group_offsets[:-1])]


def _logprobs_by_rank(scored: ScoredGroups) -> dict[str, float]:
    count = np.bincount(scored.ranks)
    total = np.bincount(scored.ranks, weights=scored.logprob_sums / scored.lengths)
    return {f"logps/rank_{rank}": float(total[rank] / count[rank]) for rank in np.flatnonzero(count)}
