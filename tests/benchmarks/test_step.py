"""The step benchmark on the tiny model: a record with both ways, agreement and ratios; memory is foretold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Rounds
from benchmarks.record import read_record
from benchmarks.step import StepBench, read_batches, typical_batch
from tuna.compare.side_by_side import LossSettings, Way, count_tokens
from tuna.models.loading import TINY
from tuna_kernels import Group

ROOT = Path(__file__).parents[2]


def test_the_program_leaves_a_record_of_both_ways(tmp_path: Path) -> None:
    words = ["--model", TINY, "--groups", "2", "--rounds", "2", "--threads", "1", "--no-resident"]
    command = [sys.executable, "-m", "benchmarks.step", *words, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    agreement, step = read_record(tmp_path / "step.json").comparisons
    assert [arm.name for arm in agreement.arms][::3] == ["tuna, paper", "tuna, released"]
    assert all(arm.status == "ok" and not arm.samples for arm in agreement.arms)
    assert [arm.name for arm in step.arms] == ["tuna", "baseline", "plain tree"]
    assert step.arm("baseline").ratios["baseline step"].cpu.median == 1.0
    assert 0 < (step.arm("tuna").ratios["baseline step"].memory or 0) < 1
    assert step.setting["tree"] < step.setting["unshared"] <= step.setting["padded"]  # type: ignore[operator]
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_a_baseline_step_that_would_not_fit_is_skipped_and_said_so() -> None:
    bench = StepBench(TINY, LossSettings(), threads=1, plan=Rounds(rounds=1), resident=False)
    (batch,) = read_batches(None, TINY, "alpaca", 128, [1], seed=0)
    assert bench.lacks_memory(count_tokens(batch).padded) == ""
    bench.baseline_bytes_per_token = 1e12
    (step,) = bench.run(batch)
    assert step.arm("baseline").status == "unsupported" and "GiB are free" in step.arm("baseline").reason
    assert step.arm("tuna").status == "ok" and step.arm("tuna").samples
    assert "oracle: our own float32 step, without the baseline" in step.title


def test_ways_can_be_left_out_and_activations_computed_again() -> None:
    ways: tuple[Way, ...] = ("tuna", "plain tree")
    bench = StepBench(TINY, LossSettings(), 1, Rounds(rounds=1), resident=False, ways=ways, checkpointed=True)
    (batch,) = read_batches(None, TINY, "alpaca", 128, [1], seed=0)
    (step,) = bench.run(batch)
    assert [arm.name for arm in step.arms] == list(ways)
    assert all(arm.status == "ok" for arm in step.arms) and set(step.arm("tuna").ratios) == {"plain-torch tree"}
    assert bench.steppers["tuna"].model.is_gradient_checkpointing


def test_a_typical_batch_is_of_median_size_and_reproducible() -> None:
    groups = [Group([1] * n, [[2], [3]]) for n in range(1, 20)]
    batch = typical_batch(groups, 1, seed=3)
    assert batch == typical_batch(groups, 1, seed=3)
    assert 4 <= len(batch[0].prompt) <= 16, "neither the smallest nor the largest"
    with pytest.raises(ValueError, match="20 groups cannot be drawn from 19"):
        typical_batch(groups, 20, seed=0)
