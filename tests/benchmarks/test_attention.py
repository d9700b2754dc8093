"""The arms of the attention benchmark compute one and the same attention, and its gradients; heads are read right."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.attention import MODES, TOLERANCE, Heads, Mode, attention_arms, main, make_case, oracle
from benchmarks.harness import check_arm
from benchmarks.record import read_record
from tuna_kernels import Group, available_backends

RAGGED = [
    Group([1, 2, 3], [[4, 5, 6, 7], [4, 5], [9]], ranks=[0, 1, 2]),
    Group([5], [[6, 7], [8, 9, 10, 11, 12]], ranks=[1, 0]),
]


@pytest.mark.parametrize("mode", MODES)
def test_every_arm_is_right(mode: Mode) -> None:
    """Shared prompts, a response that begins another one, sequences of several lengths."""
    case = make_case(RAGGED, Heads(4, 2, 8), mode)
    right = oracle(case)
    assert len(right) == (4 if mode == "training" else 1)
    reports = {arm.name: check_arm(arm, case, right, TOLERANCE) for arm in attention_arms()}
    expected = "unsupported" if available_backends()["cpu"] else "ok"
    assert {name: r.status for name, r in reports.items()} == {
        "sdpa padded": "ok",
        "sdpa dense": "ok",
        "tuna torch": "ok",
        "tuna cpu": expected,
    }


def test_heads_are_parsed_and_bad_ones_named() -> None:
    assert Heads.parse("9x3x64") == Heads(9, 3, 64)
    for bad in ("9x3", "9x2x64", "0x1x2", "axbxc"):
        with pytest.raises(ValueError, match=f"heads '{bad}'"):
            Heads.parse(bad)


def test_one_command_writes_the_record(tmp_path: Path) -> None:
    main(groups=[1], heads="2x1x8", mode=["training"], rounds=1, threads=1, output=tmp_path)
    (table,) = read_record(tmp_path / "attention.json").comparisons
    assert table.setting["groups"] == 1 and table.arm("sdpa padded").ratios
    assert (tmp_path / "attention.md").exists() and (tmp_path / "attention.png").exists()
