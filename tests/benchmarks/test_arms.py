"""Every arm runs, the oracle is right, and the whole program leaves a record that can be read again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks import ranking
from benchmarks.arms import MODES, TRAINABLE, Case, Mode, Shape, logprob_arms, make_case, oracle, run_case, tolerance
from benchmarks.harness import Arm, check_arm
from benchmarks.kernels import HALF, bounds_of, units_of
from benchmarks.record import read_record, write_record
from tuna_kernels.dispatch import available_backends
from tuna_kernels.versions import release

ROOT = Path(__file__).parents[2]
TINY = Shape(24, 16, 300)
SLOW_TO_COMPILE = ("CCE compiled", "baseline compiled")


def arms(*, slow: bool) -> list[Arm[Case]]:
    return [arm for arm in logprob_arms() if (arm.name in SLOW_TO_COMPILE) == slow]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 40), st.sampled_from(MODES), st.integers(1, 4000))
def test_the_oracle_equals_autograd_in_float64(rows: int, width: int, vocab: int, mode: Mode, block: int) -> None:
    case = make_case(Shape(rows, width, vocab), "float32", mode, seed=rows)
    wide = dataclasses.replace(
        case,
        hidden=case.hidden.detach().double().requires_grad_(mode != "forward"),
        weight=case.weight.detach().double().requires_grad_(mode in TRAINABLE),
        upstream=case.upstream.double(),
    )
    baseline = run_case(wide, lambda x, w, t: torch.log_softmax(x @ w.T, -1)[torch.arange(len(t)), t])
    mine = oracle(case, block_bytes=block)
    assert set(mine) == set(baseline)
    for name, right in baseline.items():
        torch.testing.assert_close(mine[name], right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_every_arm_serves_every_mode_within_tolerance(mode: Mode, dtype: str) -> None:
    case = make_case(TINY, dtype, mode)
    for arm in arms(slow=False):
        report = check_arm(arm, case, oracle(case), tolerance(dtype, TINY.vocab))
        assert report.status == "ok" or (report.status == "unsupported" and report.reason), report


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_compiled_arm_serves_every_mode(mode: Mode) -> None:
    case = make_case(TINY, "float32", mode)
    for arm in arms(slow=True):
        report = check_arm(arm, case, oracle(case), tolerance("float32", 300))
        assert report.status == "ok" or (report.status == "unsupported" and report.reason), report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_the_tolerance_bites(dtype: str, share: float) -> None:
    """An arm that leaves the last few columns of the vocabulary out of the sum does not pass."""
    case = make_case(TINY, dtype, "frozen")

    def forgetful(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        z = x.float() @ w.float().T
        seen = z.topk(int(z.shape[1] * (1 - share)), dim=1, largest=False).values
        return z.gather(1, t[:, None])[:, 0] - seen.logsumexp(1)

    arm: Arm[Case] = Arm("forgetful", lambda case: run_case(case, forgetful))
    assert check_arm(arm, case, oracle(case), tolerance(dtype, TINY.vocab)).status == "wrong"


@pytest.mark.parametrize("mode", ["trainable", "frozen"])
def test_the_ranking_arms_agree_with_their_oracle(mode: Mode) -> None:
    case = ranking.make_ranking_case(Shape(330, 16, 211), "float32", mode)
    assert case.tree.num_groups == 2
    right = ranking.ranking_oracle(case)
    for arm in ranking.ranking_arms():
        report = check_arm(arm, case, right, ranking.ranking_tolerance("float32", 211))
        assert report.status == "ok" or (report.status == "unsupported" and report.reason), report


def test_the_bounds_count_the_products_they_are_named_after() -> None:
    for mode in MODES:
        for bound in bounds_of(TINY, "float32", mode):
            products = sum(n * (0.5 if name.endswith(HALF) else 1) for name, n in bound.units.items())
            assert products == (float(bound.name.split()[0]) if "mm" in bound.name else 1)
    trainable = bounds_of(TINY, "float32", "trainable")[0]
    assert trainable.bytes == 4 * (24 * 300 + 24 * 16 + 300 * 16)


def test_half_of_the_upstreams_zero_brings_its_own_units() -> None:
    case = make_case(TINY, "float32", "half")
    assert case.upstream[::2].abs().max() == 0 and bool((case.upstream[1::2] != 0).all())
    named = {name for bound in bounds_of(TINY, "float32", "half") for name in bound.units}
    units = units_of(case)
    if not available_backends()["cpu"]:
        assert named <= set(units)
    for unit in units.values():
        unit()


@pytest.mark.parametrize("text", ["1x2", "axbxc", "0x4x4", "1x2x3x4"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shape"):
        Shape.parse(text)


def test_the_program_leaves_a_record_table_and_picture(tmp_path: Path) -> None:
    arguments = ["--quick", "--mode", "frozen", "--dtype", "float32", "--threads", "1"]
    chosen = ["--arm", "baseline", "--arm", "tuna torch", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.kernels", *arguments, *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "kernels.json")
    titles = [comparison.title.split(",")[0] for comparison in record.comparisons]
    assert titles == ["log-probs", "ranking loss"]
    logprobs = record.comparisons[0]
    assert [arm.name for arm in logprobs.arms] == ["baseline", "tuna torch"]
    for arm in logprobs.arms:
        assert len(arm.samples) == 2 and set(arm.ratios) == {bound.name for bound in logprobs.bounds}
    assert "| baseline |" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "kernels-64x32x512-float32.png").stat().st_size > 10_000
    assert record.machine.threads == 1
    assert release(record.machine.versions["torch"]) == release(torch.__version__)

    again = tmp_path / "again.json"
    write_record(record, again)
    assert read_record(again) == record
    assert again.read_bytes() == (tmp_path / "kernels.json").read_bytes()

    other = json.loads(again.read_text()) | {"schema": "tuna-benchmark/0"}
    again.write_text(json.dumps(other))
    with pytest.raises(ValidationError, match="tuna-benchmark/1"):
        read_record(again)
