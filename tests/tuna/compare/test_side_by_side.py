"""Both ways of a step agree, count their tokens right, and leave the weights as they are."""

from __future__ import annotations

import copy

import pytest
import torch

from tuna.compare.side_by_side import WAYS, LossSettings, Stepper, Way, agreement, count_tokens, step_memory
from tuna.models.loading import TINY, tiny_model
from tuna_kernels import Group
from tuna_kernels.losses import Preset

GROUPS = [
    Group([5, 6, 7, 8], [[9, 10, 11], [9, 12], [13]], ranks=[1, 0, 2]),
    Group([5, 6], [[20, 21, 22, 23], [24]], scores=[0.25, 0.5]),
]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model()[0]


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_both_ways_agree_with_float64_within_float32(model: torch.nn.Module, preset: Preset) -> None:
    found = agreement(model, GROUPS, LossSettings(preset=preset, mle_weight=0.5))
    # Two layers deep: some tens of roundings stand between a weight and its gradient.
    limit = 50 * torch.finfo(torch.float32).eps
    for errors in (found.tuna_to_exact, found.baseline_to_exact, found.tuna_to_baseline):
        for kind in ("loss", "gradient"):
            assert errors[kind].max_rel is not None and errors[kind].max_rel < limit, (kind, errors)


def test_another_margin_is_seen_by_both_ways_alike(model: torch.nn.Module) -> None:
    """The settings reach both losses: changing one changes both by the same amount."""
    plain, wide = (agreement(model, GROUPS, LossSettings(margin=margin)).losses for margin in (0.1, 0.4))
    assert wide["baseline"] - plain["baseline"] > 0.1
    assert wide["tuna"] - plain["tuna"] == pytest.approx(wide["baseline"] - plain["baseline"], abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_repeats_and_leaves_the_weights_alone(model: torch.nn.Module, way: Way) -> None:
    network = copy.deepcopy(model)
    step = Stepper(way, network, LossSettings())
    first, second = step(GROUPS), step(GROUPS)
    assert torch.equal(first, second)
    for mine, original in zip(network.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, original)
        assert mine.grad is not None and mine.grad.abs().max() > 0
    assert all(state["step"] == 2 for state in step.optimizer.state.values()), "AdamW did run"


def test_tokens_of_both_ways_by_hand() -> None:
    counted = count_tokens(GROUPS)
    # a: prompt 4, 9 shared, 10 11, 12, 13 -> 9; b: prompt 2, 4 + 1 -> 7. Longest full sequence 7, five of them.
    assert (counted.tree, counted.unshared, counted.padded) == (16, 4 * 3 + 6 + 2 * 2 + 5, 35)


def test_memory_of_a_step_in_a_fresh_process_counts_the_gradients_at_least(model: torch.nn.Module) -> None:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = step_memory("tuna", TINY, GROUPS, LossSettings(), threads=1)
    assert peak.process > peak.growth >= weights / 2
