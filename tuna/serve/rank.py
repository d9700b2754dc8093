"""`POST /v1/rank`: responses to one prompt, scored a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from tuna_kernels import Group, pack_groups
from tuna_kernels.integrations.transformers import score_groups

__all__ = ["Scored", "parts_of", "rank_answer", "score_part"]


@dataclass
class Scored:
    """Scores of responses, their tokens with log-probabilities, and the number of tokens computed."""

    scores: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    computed: int = 0


def parts_of(group: Group, max_tokens: int) -> Iterator[Group]:
    """Split a group into parts of at most `max_tokens` tokens, prompt included, but at least one response each.

    The score of a response does not depend on the others in its part.
    """
    run: list[Any] = []
    size = len(group.prompt)
    for response in group.responses:
        if run and size + len(response) > max_tokens:
            yield Group(group.prompt, run, ranks=[0] * len(run))
            run, size = [], len(group.prompt)
        run.append(response)
        size += len(response)
    yield Group(group.prompt, run, ranks=[0] * len(run))


def score_part(model: PreTrainedModel, group: Group, length_penalty: float) -> Scored:
    """Score all responses of a group; runs on the engine's thread."""
    tree = pack_groups([group])
    with torch.inference_mode():
        found = score_groups(model, tree, length_penalty=length_penalty)
    logprobs, targets = found.logprobs.double().tolist(), tree.targets.tolist()
    places = list(pairwise(tree.candidate_offsets_host.tolist()))
    return Scored(
        found.scores.double().tolist(),
        [targets[start:end] for start, end in places],
        [logprobs[start:end] for start, end in places],
        tree.num_tokens,
    )


def rank_answer(group: Group, parts: Sequence[Scored], *, length_penalty: float, with_logprobs: bool) -> dict[str, Any]:
    """The answer to the client: responses in order of their scores; equal scores have the same rank.

    Raises:
        ValueError: non-finite score.
    """
    scores = [score for part in parts for score in part.scores]
    tokens = [ids for part in parts for ids in part.tokens]
    logprobs = [values for part in parts for values in part.logprobs]
    levels = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    results = []
    for index, (score, ids, values) in enumerate(zip(scores, tokens, logprobs, strict=True)):
        result: dict[str, Any] = {
            "index": index,
            "score": score,
            "rank": levels[score],
            "tokens": len(ids),
            "logprob_sum": sum(values),
            "logprob_mean": sum(values) / len(ids),
        }
        results.append(result | ({"token_ids": ids, "token_logprobs": values} if with_logprobs else {}))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    unshared = sum(len(group.prompt) + len(ids) for ids in tokens)
    counted = {"computed_tokens": sum(part.computed for part in parts), "unshared_tokens": unshared}
    return {"length_penalty": length_penalty, "order": order, "results": results, "usage": counted}
