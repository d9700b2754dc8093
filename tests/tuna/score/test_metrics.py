"""Laws of `tuna.score.metrics`: figures equal loops over pairs written out; joining and reordering groups loses
nothing; the loss from scores equals the hand formula of both presets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuna.score.metrics import ScoredGroups, loss_parts, ranking_metrics
from tuna.train.config import TunaConfig

# One group: (rank, score, log-prob sum, length) of each candidate. Few values, so that ties come up.
candidate = st.tuples(
    st.integers(0, 3),
    st.sampled_from([-2.0, -1.5, -0.25, 0.0]),
    st.sampled_from([-7.0, -3.5]),
    st.integers(1, 4),
)
group = st.lists(candidate, min_size=1, max_size=5)
grouped = st.lists(group, min_size=1, max_size=6)
Grouped = list[list[tuple[int, float, float, int]]]


def scored_of(groups: Grouped) -> ScoredGroups:
    flat = [candidate for group in groups for candidate in _dense(group)]
    ranks, scores, sums, lengths = zip(*flat, strict=True) if flat else ((), (), (), ())
    return ScoredGroups(
        np.array(scores, np.float64),
        np.array(sums, np.float64),
        np.array(lengths, np.int64),
        np.array(ranks, np.int64),
        np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64),
    )


def _dense(group: list[tuple[int, float, float, int]]) -> list[tuple[int, float, float, int]]:
    order = {rank: i for i, rank in enumerate(sorted({c[0] for c in group}))}
    return [(order[rank], *rest) for rank, *rest in group]


def pairs_of(group: list[tuple[int, float, float, int]]) -> list[tuple[int, float]]:
    """(lag, better minus worse score) of each pair."""
    dense = _dense(group)
    return [(b[0] - a[0], a[1] - b[1]) for a in dense for b in dense if a[0] < b[0]]


@given(grouped)
@settings(max_examples=200, deadline=None)
def test_figures_equal_loops_over_pairs(groups: Grouped) -> None:
    metrics = ranking_metrics(scored_of(groups))
    pairs = [pair for group in groups for pair in pairs_of(group)]
    ranked = [group for group in groups if pairs_of(group)]
    if not pairs:
        assert not {"rank/accuracy", "rank/top1", "rank/kendall", "margin/mean"} & metrics.keys()
        return
    assert metrics["rank/accuracy"] == pytest.approx(sum(gap > 0 for _, gap in pairs) / len(pairs), rel=1e-12)
    assert metrics["margin/mean"] == pytest.approx(math.fsum(gap for _, gap in pairs) / len(pairs), abs=1e-12)
    top1, tau = 0, []
    for group in ranked:
        dense = _dense(group)
        best = max(c[1] for c in dense if c[0] == 0)
        top1 += all(best > c[1] for c in dense if c[0] > 0)
        gaps = [gap for _, gap in pairs_of(group)]
        tau.append((sum(gap > 0 for gap in gaps) - sum(gap < 0 for gap in gaps)) / len(gaps))
    assert metrics["rank/top1"] == pytest.approx(top1 / len(ranked), rel=1e-12)
    assert metrics["rank/kendall"] == pytest.approx(math.fsum(tau) / len(tau), abs=1e-12)


@given(grouped)
@settings(max_examples=100, deadline=None)
def test_mean_logprob_of_each_rank(groups: Grouped) -> None:
    metrics = ranking_metrics(scored_of(groups))
    means: dict[int, list[float]] = {}
    for group in groups:
        for rank, _, total, length in _dense(group):
            means.setdefault(rank, []).append(total / length)
    expected = {f"logps/rank_{rank}": sum(values) / len(values) for rank, values in means.items()}
    assert {name: v for name, v in metrics.items() if name.startswith("logps/")} == pytest.approx(expected)


@given(grouped, st.sampled_from(["paper", "released"]), st.floats(0, 0.5), st.floats(0, 2))
@settings(max_examples=100, deadline=None)
def test_loss_parts_equal_the_hand_formula(groups: Grouped, preset: str, margin: float, weight: float) -> None:
    parts = loss_parts(scored_of(groups), preset=preset, margin=margin, mle_weight=weight)
    hinges = [[(lag, max(0.0, margin * lag - gap)) for lag, gap in pairs_of(group)] for group in groups]
    if preset == "paper":
        ranking = sum(hinge for group in hinges for _, hinge in group) / len(groups)
        firsts = [next(c for c in _dense(group) if c[0] == 0) for group in groups]
        mle = -sum(total / length for _, _, total, length in firsts) / len(groups)
    else:
        by_lag: dict[int, list[float]] = {}
        for lag, hinge in (pair for group in hinges for pair in group):
            by_lag.setdefault(lag, []).append(hinge)
        ranking = sum(sum(values) / len(values) for values in by_lag.values())
        everything = [c for group in groups for c in group]
        mle = -sum(c[2] for c in everything) / sum(c[3] for c in everything)
    assert parts.ranking == pytest.approx(ranking, rel=1e-12, abs=1e-12)
    assert parts.mle == pytest.approx(mle, rel=1e-12)
    assert parts.loss == pytest.approx(ranking + weight * mle, rel=1e-12, abs=1e-12)


@given(grouped, st.data())
@settings(max_examples=50, deadline=None)
def test_select_undoes_any_order_of_concatenation(groups: Grouped, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(groups))))
    joined = ScoredGroups.concatenate([scored_of([groups[i]]) for i in order])
    restored, expected = joined.select(np.argsort(order)), scored_of(groups)
    for name in ("scores", "logprob_sums", "lengths", "ranks", "group_offsets"):
        np.testing.assert_array_equal(getattr(restored, name), getattr(expected, name))


def test_equal_scores_are_never_right() -> None:
    metrics = ranking_metrics(scored_of([[(0, -1.0, -1.0, 1), (1, -1.0, -1.0, 1)]]))
    assert metrics["rank/accuracy"] == metrics["rank/top1"] == metrics["rank/kendall"] == 0


def test_no_groups_have_no_loss() -> None:
    with pytest.raises(ValueError, match="no groups"):
        loss_parts(ScoredGroups.concatenate([]))


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="preset = 'rrhf'"):
        loss_parts(scored_of([[(0, -1.0, -1.0, 1)]]), preset="rrhf")


def test_which_end_of_a_metric_is_better(tmp_path: Path) -> None:
    lower, higher = ("loss", "eval_loss", "loss/rank", "eval_a_loss/mle"), ("rank/accuracy", "eval_b_margin/mean")
    for names, expected in ((lower, False), (higher, True)):
        for name in names:
            assert (
                TunaConfig(
                    output_dir=str(tmp_path), eval_strategy="steps", metric_for_best_model=name
                ).greater_is_better
                is expected
            )
    with pytest.raises(ValueError, match="metric_for_best_model = 'rank/acuracy' is not one of loss"):
        TunaConfig(output_dir=str(tmp_path), eval_strategy="steps", metric_for_best_model="rank/acuracy")
    own = TunaConfig(
        output_dir=str(tmp_path), eval_strategy="steps", metric_for_best_model="mine", greater_is_better=False
    )
    assert own.greater_is_better is False
