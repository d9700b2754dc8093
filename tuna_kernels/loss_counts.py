"""The denominators of a ranking loss, counted from ranks alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class LossCounts:
    """The denominators of a loss, counted over the whole optimizer step (all ranks, all accumulation steps).

    Counts add: `a + b` are the counts of two micro-batches together.

    Attributes:
        groups: number of groups, including those without any pair.
        pairs_by_lag: `pairs_by_lag[d - 1]` is the number of pairs with rank difference `d`.
        tokens: number of response tokens (slots) of all candidates.

    Examples:
        >>> LossCounts.from_ranks([0, 1, 1, 0, 1], [0, 3, 5], tokens=12)
        LossCounts(groups=2, pairs_by_lag=(3,), tokens=12)
    """

    groups: int
    pairs_by_lag: tuple[int, ...]
    tokens: int

    @classmethod
    def from_ranks(
        cls, ranks: npt.ArrayLike | Tensor, group_offsets: npt.ArrayLike | Tensor, tokens: int
    ) -> LossCounts:
        """Count the pairs of `ranks` [C] (0 = best, equal = tie) within the groups `group_offsets` [G+1]."""
        ranks_ = torch.as_tensor(ranks, dtype=torch.int64)
        offsets = torch.as_tensor(group_offsets, dtype=torch.int64)
        better, worse = ranked_pairs(ranks_, offsets)
        by_lag = torch.bincount(ranks_[worse] - ranks_[better], minlength=1)[1:]
        return cls(groups=offsets.numel() - 1, pairs_by_lag=tuple(by_lag.tolist()), tokens=int(tokens))

    def __add__(self, other: LossCounts) -> LossCounts:
        if not isinstance(other, LossCounts):
            return NotImplemented
        longer, shorter = sorted((self.pairs_by_lag, other.pairs_by_lag), key=len, reverse=True)
        shorter = shorter + (0,) * (len(longer) - len(shorter))
        pairs = tuple(a + b for a, b in zip(longer, shorter, strict=True))
        return LossCounts(self.groups + other.groups, pairs, self.tokens + other.tokens)


def ranked_pairs(ranks: Tensor, group_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs (better, worse) of candidates of one group with `ranks[better] < ranks[worse]`.

    Takes `ranks` [C] and `group_offsets` [G+1], int64; returns two int64 tensors [P] of candidate indices.
    """
    sizes = group_offsets.diff()
    start = group_offsets[:-1].repeat_interleave(sizes)  # [C] first candidate of the candidate's group
    partners = sizes.repeat_interleave(sizes)  # [C] size of the candidate's group
    first = torch.arange(ranks.numel(), device=ranks.device).repeat_interleave(partners)
    pair_start = partners.cumsum(0) - partners
    second = torch.arange(first.numel(), device=ranks.device) - (pair_start - start).repeat_interleave(partners)
    ordered = ranks[first] < ranks[second]
    return first[ordered], second[ordered]
