"""Scores of whole datasets: trees run through the model, a few numbers per candidate copied to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tuna.score.metrics import IntArray, ScoredGroups
from tuna_kernels import PackedTree, sequence_scores


@dataclass(frozen=True)
class PendingScores:
    """`ScoredGroups` whose numbers are still on the device; constructing one needs no host synchronisation.

    `scores` and `logprob_sums` are [C] and carry no graph.
    """

    scores: Tensor
    logprob_sums: Tensor
    lengths: IntArray
    ranks: IntArray
    group_offsets: IntArray

    @classmethod
    def of(cls, tree: PackedTree, scores: Tensor, logprobs: Tensor) -> PendingScores:
        """From `scores` [C] and `logprobs` [M] of a tree on the same device."""
        return cls(
            scores=scores.detach(),
            logprob_sums=sequence_scores(logprobs.detach(), tree.candidate_offsets, length_penalty=0.0),
            lengths=np.diff(tree.candidate_offsets_host),
            ranks=tree.ranks_host,
            group_offsets=tree.group_offsets_host,
        )

    def fetch(self) -> ScoredGroups:
        """The numbers on the host, in float64."""
        return ScoredGroups(
            scores=self.scores.double().cpu().numpy(),
            logprob_sums=self.logprob_sums.double().cpu().numpy(),
            lengths=self.lengths,
            ranks=self.ranks,
            group_offsets=self.group_offsets,
        )


def in_dataset_order(parts: Sequence[ScoredGroups], plan: Sequence[Sequence[int]]) -> ScoredGroups:
    """Join the results of micro-batches in dataset order; `plan[i]` has the group indices of `parts[i]`."""
    indices = np.array([group for batch in plan for group in batch], dtype=np.int64)
    return ScoredGroups.concatenate(parts).select(np.argsort(indices, kind="stable"))
