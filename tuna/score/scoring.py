"""Scoring of ranked responses with any model, without training: how often the model ranks as the data does."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tuna.data.batching import GroupBatchSampler, group_loader
from tuna.data.tokenization import TokenizedGroup
from tuna.data.vocabulary import check_vocabulary
from tuna.score.evaluation import PendingScores, in_dataset_order
from tuna.score.metrics import ScoredGroups, ranking_metrics
from tuna_kernels.integrations.transformers import prepare_model, score_groups
from tuna_kernels.tree import Share


@dataclass(frozen=True)
class ScoreReport:
    """Scores of a dataset, in its order, and their cost.

    `tokens` is the number of packed tokens computed, `unshared_tokens` that of separate sequences; `seconds` is wall
    time.
    """

    scored: ScoredGroups
    tokens: int
    unshared_tokens: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Metrics and costs as plain JSON values."""
        return {
            "groups": self.scored.num_groups,
            "candidates": len(self.scored.scores),
            "metrics": ranking_metrics(self.scored),
            "tokens": self.tokens,
            "unshared_tokens": self.unshared_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }


def score_dataset(
    model: nn.Module,
    groups: Sequence[TokenizedGroup],
    *,
    tokens_per_batch: int = 4096,
    length_penalty: float = 1.0,
    share: Share = "tree",
    backend: str = "auto",
    on_batch: Callable[[int], None] = lambda tokens: None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ScoreReport:
    """Score all responses of `groups`, on the device the model is on, in evaluation mode.

    Args:
        model: a causal language model of transformers, or one wrapped by peft.
        groups: the groups to score; responses need no ranks.
        tokens_per_batch: maximum packed tokens per pass; a larger group gets a separate pass.
        length_penalty: a score is `sum(log p) / length ** length_penalty`.
        share: as in `tuna_kernels.pack_groups`.
        backend: of `tuna_kernels`.
        on_batch: called after each pass with its number of packed tokens.
        tokenizer: the groups' tokenizer, used in errors.

    Raises:
        ValueError: no groups, `tokens_per_batch` below 1, tokens without an embedding in the model, or an unsupported
            model.
    """
    check_vocabulary(model, groups, tokenizer)
    sampler = GroupBatchSampler(
        [item.group for item in groups],
        tokens_per_batch=tokens_per_batch,
        shuffle=False,
        share=share,
        lone_groups=True,
    )
    model = prepare_model(model).eval()
    device = next(model.parameters()).device
    parts, tokens, unshared, start = [], 0, 0, time.perf_counter()
    score = functools.partial(score_groups, model, length_penalty=length_penalty, backend=backend)
    for batch in group_loader(groups, sampler, share=share):
        tree = batch["tree"].to(device)
        with torch.no_grad():
            result = score(tree)
        parts.append(PendingScores.of(tree, result.scores, result.logprobs).fetch())
        tokens += tree.num_tokens
        unshared += tree.unshared_tokens
        on_batch(tree.num_tokens)
    seconds = time.perf_counter() - start
    return ScoreReport(in_dataset_order(parts, sampler.plan()), tokens, unshared, seconds)


def per_record(groups: Sequence[TokenizedGroup], scored: ScoredGroups) -> Iterator[dict[str, Any]]:
    """One row per record: its id, and in the order of its responses scores, mean log-probabilities, lengths, ranks.

    `accuracy` is the fraction of the record's pairs ranked correctly, None if it has no pair; `cut` is the number of
    responses cut to the length limit.
    """
    means = scored.logprob_sums / scored.lengths
    for number, (item, (first, last)) in enumerate(zip(groups, pairwise(scored.group_offsets), strict=True)):
        yield {
            "id": item.id,
            "scores": scored.scores[first:last].tolist(),
            "mean_logprobs": means[first:last].tolist(),
            "lengths": scored.lengths[first:last].tolist(),
            "ranks": scored.ranks[first:last].tolist(),
            "accuracy": ranking_metrics(scored.select(np.array([number]))).get("rank/accuracy"),
            "cut": item.cut_responses,
        }
