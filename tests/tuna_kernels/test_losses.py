"""The ranking loss equals its definition, pair by pair, and its gradient is the derivative."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuna_kernels import LossCounts, ranking_loss, sequence_scores


def by_definition(
    scores: torch.Tensor, ranks: list[int], offsets: list[int], reduction: str, margin: float
) -> torch.Tensor:
    """DESIGN §3, with Python loops."""
    per_lag: dict[int, list[torch.Tensor]] = {}
    for start, stop in itertools.pairwise(offsets):
        for i in range(start, stop):
            for j in range(start, stop):
                if ranks[i] < ranks[j]:
                    lag = ranks[j] - ranks[i]
                    hinge = torch.clamp(margin * lag - (scores[i] - scores[j]), min=0)
                    per_lag.setdefault(lag, []).append(hinge)
    if reduction == "mean_groups":
        terms = [h for hinges in per_lag.values() for h in hinges]
        return torch.stack(terms).sum() / (len(offsets) - 1) if terms else scores.sum() * 0
    return sum((torch.stack(h).mean() for h in per_lag.values()), scores.sum() * 0)


@st.composite
def ranked_batches(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    """Groups of 1 to 6 candidates with ties; scores on a grid of eighths so that no hinge is at its kink."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    ranks: list[int] = []
    for size in sizes:
        raw = draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
        dense = {r: i for i, r in enumerate(sorted(set(raw)))}
        ranks += [dense[r] for r in raw]
    scores = draw(st.lists(st.integers(-20, 20), min_size=len(ranks), max_size=len(ranks)))
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return [s / 8 for s in scores], ranks, offsets


@settings(max_examples=150, deadline=None)
@given(batch=ranked_batches(), reduction=st.sampled_from(["mean_groups", "mean_per_lag"]))
def test_equals_its_definition(batch: tuple[list[float], list[int], list[int]], reduction: Any) -> None:
    values, ranks, offsets = batch
    scores = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    loss = ranking_loss(scores, torch.tensor(ranks), torch.tensor(offsets), reduction=reduction, margin=0.1)
    (gradient,) = torch.autograd.grad(loss, scores)
    expected = by_definition(scores, ranks, offsets, reduction, 0.1)
    (wanted,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, wanted)


@settings(max_examples=60, deadline=None)
@given(batch=ranked_batches(), reduction=st.sampled_from(["mean_groups", "mean_per_lag"]))
def test_parts_with_the_counts_of_the_whole_add_up(batch: Any, reduction: Any) -> None:
    values, ranks, offsets = batch
    scores = torch.tensor(values, dtype=torch.float64)
    whole = ranking_loss(scores, torch.tensor(ranks), torch.tensor(offsets), reduction=reduction)
    parts = [(slice(a, b), [0, b - a]) for a, b in itertools.pairwise(offsets)]
    counts = LossCounts(0, (), 0)
    for part, own in parts:
        counts = counts + LossCounts.from_ranks(ranks[part], own, tokens=1)
    assert counts == LossCounts.from_ranks(ranks, offsets, tokens=len(parts))
    total = sum(
        ranking_loss(scores[p], torch.tensor(ranks[p]), torch.tensor(own), reduction=reduction, counts=counts)
        for p, own in parts
    )
    torch.testing.assert_close(total, whole)


def test_gradcheck() -> None:
    ranks, offsets = torch.tensor([0, 1, 2, 0, 1, 1]), torch.tensor([0, 3, 6])
    scores = torch.tensor([-1.0, -1.3, 0.2, -0.1, 0.4, -2.0], dtype=torch.float64, requires_grad=True)
    for reduction in ("mean_groups", "mean_per_lag"):
        assert torch.autograd.gradcheck(lambda s, r=reduction: ranking_loss(s, ranks, offsets, reduction=r), (scores,))


def test_nan_scores_give_a_nan_loss() -> None:
    loss = ranking_loss(torch.tensor([0.0, float("nan")]), torch.tensor([0, 1]), torch.tensor([0, 2]))
    assert loss.isnan()


def test_bad_input_is_named() -> None:
    scores, ranks, offsets = torch.zeros(2), torch.tensor([0, 1]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="kind = 'dpo'"):
        ranking_loss(scores, ranks, offsets, kind="dpo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction = 'sum'"):
        ranking_loss(scores, ranks, offsets, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ranks must be int64"):
        ranking_loss(scores, ranks.float(), offsets)
    with pytest.raises(ValueError, match="ranks"):
        ranking_loss(scores, torch.tensor([0, 1, 2]), offsets)
    with pytest.raises(ValueError, match="pairs_by_lag"):
        ranking_loss(scores, ranks, offsets, reduction="mean_per_lag", counts=LossCounts(1, (), 0))


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    penalty=st.sampled_from([0.0, 0.5, 1.0, 1.3]),
)
def test_scores_are_length_normalised_sums(lengths: list[int], penalty: float) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    logprobs = -torch.rand(int(offsets[-1]), dtype=torch.float64)
    scores = sequence_scores(logprobs, offsets, length_penalty=penalty)
    expected = [logprobs[a:b].sum() / (b - a) ** penalty for a, b in itertools.pairwise(offsets.tolist())]
    torch.testing.assert_close(scores, torch.stack(expected))
    assert torch.autograd.gradcheck(
        lambda x: sequence_scores(x, offsets, length_penalty=penalty), (logprobs.requires_grad_(),)
    )


def test_a_score_does_not_depend_on_its_neighbours() -> None:
    logprobs = -torch.rand(1000)
    alone = sequence_scores(logprobs[400:437], torch.tensor([0, 37]))
    among = sequence_scores(logprobs, torch.tensor([0, 13, 400, 437, 1000]))
    assert torch.equal(alone[0], among[2])


def test_bad_scores_input_is_named() -> None:
    with pytest.raises(ValueError, match="candidate 1 has length 0"):
        sequence_scores(torch.zeros(3), torch.tensor([0, 3, 3]))
    with pytest.raises(ValueError, match="0 to 2"):
        sequence_scores(torch.zeros(3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="lengths"):
        sequence_scores(torch.zeros(3), torch.tensor([0, 3]), lengths=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="int64"):
        sequence_scores(torch.zeros(3), torch.tensor([0.0, 3.0]))
