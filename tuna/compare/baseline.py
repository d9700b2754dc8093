"""The baseline way, as the paper's released code takes it: the thing that Tuna is compared with.

Every prompt is copied k times, each copy is followed by one response, the G * k sequences are padded on the
right to the longest, and the model gives logits for every position of every one of them::

    [prompt a | response 1 | pad pad]
    [prompt a | response 2 longer   ]      input_ids, attention_mask [N, L]; logits [N, L, V]
    [prompt b | response 1 | pad    ]

One `log_softmax` over the full logits, a gather, and a masked sum give the scores; autograd does the rest.
The cross-entropy of preset `released` is a second pass over the same logits, as it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuna_kernels import Group, pack_groups
from tuna_kernels.attention.reference import visible
from tuna_kernels.losses import Preset

IGNORED = -100


@dataclass(frozen=True)
class BaselineOutput:
    """Result of `baseline_step_loss`: `loss` carries the gradient, the rest is detached.

    `loss = ranking + mle_weight * mle`; `scores` [C] are the length-normalised log-probabilities.
    """

    loss: Tensor
    ranking: Tensor
    mle: Tensor
    scores: Tensor


def baseline_step_loss(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    preset: Preset = "released",
    margin: float = 0.1,
    length_penalty: float = 1.0,
    mle_weight: float = 1.0,
    pad_token_id: int = 0,
) -> BaselineOutput:
    """Loss of one batch of groups with k padded copies of each prompt and full logits.

    Args:
        model: a causal language model of transformers, called as `model(input_ids=, attention_mask=)`.
        groups: the batch, one optimizer step; groups may differ in k.
        preset: `"released"`: for each rank difference the mean over the batch's pairs, summed over
            differences, plus the token mean of the cross-entropy of all candidates. `"paper"`: the sum over
            a group's pairs plus the token mean of its first best candidate, mean over groups.
        margin: score gap asked for per step of rank difference.
        length_penalty: a score is `sum(log p) / length ** length_penalty`.
        mle_weight: weight of the likelihood term.
        pad_token_id: any token of the vocabulary; padding is masked.

    Raises:
        ValueError: no groups, or an unknown preset.
    """
    if not groups:
        raise ValueError("groups is empty: the loss of no groups is not defined")
    if preset not in get_args(Preset):
        raise ValueError(f"preset = {preset!r} is not one of {get_args(Preset)}")
    device = next(model.parameters()).device
    input_ids, attention_mask, labels = (x.to(device) for x in padded_batch(groups, pad_token_id))
    logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]

    targets, counted = labels[:, 1:], labels[:, 1:] != IGNORED
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    token_logprobs = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums, lengths = (token_logprobs * counted).sum(-1), counted.sum(-1).to(logprobs.dtype)
    scores = sums / lengths**length_penalty

    ranks = [_dense_ranks(group) for group in groups]
    ranking = _ranking(scores, ranks, preset, margin)
    if preset == "released":
        wide = logits.to(logprobs.dtype)  # the second pass of the released code: output.loss
        mle = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    else:
        best = torch.tensor(_first_best(ranks), device=device)
        mle = -(sums[best] / lengths[best]).mean()
    loss = ranking + mle_weight * mle
    return BaselineOutput(loss, ranking.detach(), mle.detach(), scores.detach())


def plain_tree_loss(
    model: Any,
    groups: Sequence[Group],
    *,
    preset: Preset = "released",
    margin: float = 0.1,
    length_penalty: float = 1.0,
    mle_weight: float = 1.0,
) -> BaselineOutput:
    """The same loss from the packed tree by a few lines of plain torch: what the kernels are worth beyond the layout.

    Attention is SDPA with a [T, T] mask, the head gives logits of every slot. Arguments as in `baseline_step_loss`; the
    model must have transformers' own attention (`sdpa`).
    """
    tree = pack_groups(groups, device=next(model.parameters()).device)
    sees = visible(tree.subtree_end)
    hidden = model.base_model(
        input_ids=tree.input_ids[None],
        position_ids=tree.position_ids[None],
        attention_mask=sees[None, None],
        use_cache=False,
    )[0][0]
    logits = model.get_output_embeddings()(hidden[tree.rows])
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    token_logprobs = logprobs.gather(-1, tree.targets[:, None])[:, 0]
    counts = tree.candidate_offsets.diff()
    sums = torch.stack([part.sum() for part in token_logprobs.split(counts.tolist())])
    lengths = counts.to(sums.dtype)
    ranks = [_dense_ranks(group) for group in groups]
    ranking = _ranking(sums / lengths**length_penalty, ranks, preset, margin)
    mle = -token_logprobs.mean() if preset == "released" else -(sums / lengths)[_first_best(ranks)].mean()
    return BaselineOutput(
        ranking + mle_weight * mle, ranking.detach(), mle.detach(), (sums / lengths**length_penalty).detach()
    )


def padded_batch(groups: Sequence[Group], pad_token_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`input_ids`, `attention_mask` and `labels` [N, L] int64 of all candidates, padded on the right.

    Labels are -100 on the prompt and on padding.
    """
    sequences = [(_tokens(group.prompt), _tokens(response)) for group in groups for response in group.responses]
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.full((len(sequences), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (prompt, response) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        attention_mask[row, :end] = 1
        labels[row, start:end] = torch.tensor(response)
    return input_ids, attention_mask, labels


def _tokens(ids: Any) -> list[int]:
    """Token ids, however they are given (list, array, tensor)."""
    return [int(token) for token in ids]


def _dense_ranks(group: Group) -> list[int]:
    """0 = best; equal responses are tied at the best rank among them."""
    given: list[Any]
    if group.ranks is not None:
        given = list(group.ranks)
    elif group.scores is not None:
        given = [-score for score in group.scores]
    else:
        given = [0] * len(group.responses)
    texts = [_tokens(response) for response in group.responses]
    tied = [min(g for g, other in zip(given, texts, strict=True) if other == text) for text in texts]
    order = {value: rank for rank, value in enumerate(sorted(set(tied)))}
    return [order[value] for value in tied]


def _first_best(ranks: Sequence[Sequence[int]]) -> list[int]:
    """Position in the batch of each group's first rank-0 candidate."""
    best, start = [], 0
    for group in ranks:
        best.append(start + group.index(0))
        start += len(group)
    return best


def _ranking(scores: Tensor, ranks: Sequence[Sequence[int]], preset: Preset, margin: float) -> Tensor:
    better, worse, lags, start = [], [], [], 0
    for group in ranks:
        for i, rank_i in enumerate(group):
            for j, rank_j in enumerate(group):
                if rank_i < rank_j:
                    better.append(start + i)
                    worse.append(start + j)
                    lags.append(rank_j - rank_i)
        start += len(group)
    if not lags:
        return scores.sum() * 0.0
    lag = torch.tensor(lags, device=scores.device)
    # margin * lag with integers would be rounded to torch's default float32.
    hinge = (margin * lag.to(scores.dtype) - (scores[better] - scores[worse])).clamp(min=0)
    if preset == "paper":
        return hinge.sum() / len(ranks)
    of_lag = {d: [i for i, other in enumerate(lags) if other == d] for d in sorted(set(lags))}
    return torch.stack([hinge[pairs].mean() for pairs in of_lag.values()]).sum()
