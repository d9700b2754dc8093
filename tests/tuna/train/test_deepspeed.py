"""Law: two ranks under DeepSpeed ZeRO-1, 2, 3 take the steps that one process takes without it: the weights after
every step, the losses and the evaluation are the same, with and without offload, adapters, checkpointing, and whatever
each rank gets of the data (a rank that waits for a collective that never comes is ended by a watchdog).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tuna.launching import ROOT, run
from tests.tuna.train.zero_cases import CASES

pytest.importorskip("deepspeed")

ROUNDING = 1e-6  # of scores of some nats in float32; a hinge loss is a small difference of such
QUICK = [
    "zero1-lora",
    "zero2-offload",
    "zero3-adam-tied",
    "zero3-checkpointing",
    "zero3-tokens",
    "zero3-one-group",
    "zero2-two-phase",
    "zero3-two-phase",
]
Results = dict[str, dict[str, Any]]


def results(folder: Path, names: list[str]) -> tuple[Results, Results]:
    """What one process and two ranks left, by case."""
    found = []
    for ranks in (0, 2):
        place = folder / str(ranks)
        place.mkdir()
        run(ranks, "tests.tuna.train.zero_cases", [str(place), *names], cwd=ROOT, timeout=120 + 90 * len(names))
        found.append({name: torch.load(place / f"{name}.pt", weights_only=False) for name in names})
    return found[0], found[1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    return results(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    return results(tmp_path_factory.mktemp("others"), [name for name in CASES if name not in QUICK])


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_take_the_steps_of_one_process(quick: tuple[Results, Results], name: str) -> None:
    agree(quick[0][name], quick[1][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_two_ranks_take_the_steps_of_one_process_everywhere(others: tuple[Results, Results], name: str) -> None:
    agree(others[0][name], others[1][name])


def agree(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Weights within 1e-6 after every step, losses and evaluation within 1e-6 relative; and it was DeepSpeed."""
    assert two["wrapper"] == "DeepSpeedEngine"
    assert len(one["steps"]) == len(two["steps"]) > 0
    for step, (expected, found) in enumerate(zip(one["steps"], two["steps"], strict=True)):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=f"step {step}: {name}")
    moved = [name for name, value in one["steps"][-1].items() if not torch.equal(value, one["start"][name])]
    assert moved, "no weight moved: the comparison shows nothing"
    for expected, found in zip(one["log"], two["log"], strict=True):
        for name in ("loss", "loss/rank", "loss/mle", "grad_norm", "rank/accuracy", "tokens/computed"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=2e-6, abs=ROUNDING), name
    for name in ("eval_loss", "eval_rank/accuracy"):
        assert two["evaluation"][name] == pytest.approx(one["evaluation"][name], rel=2e-6, abs=ROUNDING)
