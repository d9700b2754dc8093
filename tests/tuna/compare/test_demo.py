"""The demo end to end on the tiny model, and what it takes from its data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuna.compare.demo import DemoSettings, draw_batches, read_groups, run_demo, split
from tuna.compare.side_by_side import count_tokens
from tuna.models.loading import TINY, load_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A short demo by the command, as a user runs it; what its JSON holds, and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    words = ["--tiny", "--threads", "1", "--limit", "15", "--steps", "8", "--groups", "3", "--output", str(folder)]
    command = [sys.executable, "-m", "tuna", "demo", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "Agreement" in done.stdout and "held out" in done.stdout
    return json.loads((folder / "demo.json").read_text()), folder


def test_it_leaves_a_record_and_a_picture(results: tuple[dict[str, Any], Path]) -> None:
    found, folder = results
    assert found["groups"] == {"train": 10, "held_out": 5}
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["demo.json", "demo.png", "run.json"]


def test_both_ways_agree_and_ours_takes_less(results: tuple[dict[str, Any], Path]) -> None:
    found, _ = results
    for row in found["agreement"]:
        assert row["tuna_to_exact"]["gradient"]["max_rel"] < 1e-5
    assert [row["preset"] for row in found["agreement"]] == ["paper", "released"]
    tuna, baseline = found["costs"]["tuna"], found["costs"]["baseline"]
    assert len(tuna["wall"]) == len(baseline["wall"]) == 5
    for figure in ("tokens", "allocator_peak", "growth"):
        assert 0 < tuna[figure] < baseline[figure], figure


def test_training_lowers_the_training_loss(results: tuple[dict[str, Any], Path]) -> None:
    found, _ = results
    losses = [line["loss"] for line in found["training"]["log"] if "loss" in line]
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3])
    for when in ("before", "after"):
        assert 0 <= found["training"][when]["eval_rank/accuracy"] <= 1


def test_held_out_and_training_groups_are_all_groups_and_depend_on_the_seed() -> None:
    groups = read_groups(DemoSettings.tiny(), load_tokenizer(TINY))
    train, held_out = split(groups, 0)
    assert len(held_out) == round(len(groups) / 3)
    assert sorted(group.id for group in train + held_out) == sorted(group.id for group in groups)
    assert [group.id for group in split(groups, 0)[1]] == [group.id for group in held_out]
    assert [group.id for group in split(groups, 1)[1]] != [group.id for group in held_out]


def test_the_batch_largest_when_padded_comes_first() -> None:
    settings = DemoSettings.tiny(compare_batches=4)
    groups = [item.group for item in read_groups(settings, load_tokenizer(TINY))]
    padded = [count_tokens(batch).padded for batch in draw_batches(groups, settings)]
    assert len(padded) == 4 and padded[0] == max(padded)


def test_too_few_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 records that can be used, the demo needs 3"):
        run_demo(DemoSettings.tiny(limit=2), tmp_path)
    with pytest.raises(ValueError, match="steps = 0"):
        DemoSettings.tiny(steps=0)


def test_a_mistake_on_the_command_line_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tuna", "demo", "--tiny", "--data", str(tmp_path / "absent.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "absent.jsonl" in done.stderr and "Traceback" not in done.stderr
