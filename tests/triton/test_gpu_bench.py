"""The GPU benchmark, rehearsed as far as it goes without a GPU."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.harness import check_arm
from benchmarks.record import read_record
from tests.triton.device import DEVICE
from tuna_kernels import pack_groups
from tuna_kernels.gpu.availability import is_interpreted
from tuna_kernels.self_check import sample_groups

APP = typer.Typer()
APP.command()(gpu.main)


@pytest.mark.slow
@pytest.mark.skipif(not is_interpreted(), reason="a rehearsal is for machines without a GPU")
def test_a_rehearsal_leaves_a_record_with_our_kernels_timed_in_every_table(tmp_path: Path) -> None:
    done = CliRunner().invoke(APP, ["--rehearse", "--dtype", "float32", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    tables = read_record(tmp_path / "gpu.json").comparisons
    assert {str(table.setting["op"]) for table in tables} == {"logprobs", "ranking", "attention"}
    for table in tables:
        assert table.arm("tuna triton").status == "ok" and table.arm("tuna triton").samples


def test_the_attention_arms_agree_with_the_oracle() -> None:
    case = gpu.attention_case(pack_groups(sample_groups(5), device=DEVICE), gpu.DTYPES["float32"], 2, 16)
    right = gpu.attention_oracle(case)
    reports = {arm.name: check_arm(arm, case, right, {"out": 1e-5, "gradient": 1e-4}) for arm in gpu.attention_arms()}
    assert {reports[name].status for name in ("SDPA, dense mask", "tuna triton", "tuna torch")} == {"ok"}
    assert all(report.status in ("ok", "unsupported") for report in reports.values()), reports


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_rehearse() -> None:
    with pytest.raises(ValueError, match="--rehearse"):
        gpu.here(rehearse=False)
