"""Laws: ranks know of each other by whatever launcher started them, or are refused; one that did its work ends with
code 0, whatever its worker threads still hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tuna.launching import ROOT, run
from tuna.train.config import TunaConfig
from tuna.train.distributed import RANKS, SIZES, launched

EXAMPLES = ROOT / "tuna" / "data" / "examples" / "ranked_demo.jsonl"


def test_a_rank_ends_whole_though_its_threads_wait_for_python(tmp_path: Path) -> None:
    run(2, "tests.tuna.train.ending_rank", (), tmp_path, timeout=200)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2"}, (0, 8)),
        ({"SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),
    ],
)
def test_every_launchers_ranks_are_known(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int]
) -> None:
    for name in (*RANKS, *SIZES, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="srun started 2 independent processes"):
        TunaConfig(output_dir=str(tmp_path))


def test_ranks_without_a_gpu_train_together_unasked(tmp_path: Path) -> None:
    words = f"train --model tiny --data {EXAMPLES} --limit 8 --max-length 64 --output {tmp_path / 'run'}"
    output = run(2, "tuna", words.split(), tmp_path, timeout=300)
    assert "x 2 processes" in output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 4
