"""Plans: parts add up, the largest batch is the largest, impossible plans are refused with one that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tuna.cli import main
from tuna.plan.cards import CARDS, find_card
from tuna.plan.comparison import compare, plan_rows
from tuna.plan.planner import GIB, Planner, fewest_gpus, largest_batch
from tuna.plan.settings import PlanRequest, Sharding, StepSettings
from tuna.plan.simulate import Simulator
from tuna.plan.sizes import model_config
from tuna.plan.workload import Workload

WORKLOAD = Workload(5, 256, 256)
ANY = ("none", "optimizer", "all")


@pytest.fixture(scope="module")
def llama() -> Planner:
    return Planner(Simulator(model_config("llama-7b")))


def _request(card: str, **changes: Any) -> PlanRequest:
    return replace(PlanRequest(find_card(card), WORKLOAD), **changes)


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_parts_add_up_to_the_peak(llama: Planner, offload: str) -> None:
    sharding = Sharding(4, 8, 3, offload)  # type: ignore[arg-type]
    plan = llama.plan(_request("a100-80", sharding=sharding))
    assert sum(plan.parts().values()) == plan.peak
    assert all(size >= 0 for size in plan.parts().values())


def test_what_is_expected_of_llama_7b(llama: Planner) -> None:
    """The figures of the issue: states decide the number of GPUs."""
    full, kahan = StepSettings(), _request("a100-80", optimizer="kahan")
    assert llama.plan(kahan).fits  # 10 bytes a parameter: one 80 GB card without offload
    assert not llama.plan(_request("a100-80")).fits
    one = fewest_gpus(llama, _request("rtx3090"), ANY)
    assert one is not None and one.request.sharding.gpus == 1
    assert 140 * GIB < one.states.host < 170 * GIB
    two = fewest_gpus(llama, _request("a100-80"))
    assert two is not None and two.request.sharding.gpus == 2
    lora = replace(full, lora_rank=64)
    long = Workload(5, 1024, 1024)
    assert llama.plan(_request("rtx3090", settings=lora, workload=long)).fits
    baseline = replace(full, method="baseline")
    official = fewest_gpus(llama, _request("a100-80", settings=baseline, groups=16))
    assert official is not None and 2 <= official.request.sharding.gpus <= 8


def test_one_group_more_does_not_fit(llama: Planner) -> None:
    request = _request("a100-40", sharding=Sharding(1, 8, 2, "optimizer"))
    best = largest_batch(llama, request)
    assert best is not None and best.fits
    assert not llama.plan(replace(request, groups=best.request.groups + 1)).fits
    assert largest_batch(llama, _request("a100-40")) is None


def test_an_impossible_plan_names_the_nearest_that_fits(llama: Planner) -> None:
    with pytest.raises(ValueError, match=r"needs 1\d\d\.\d GiB of the 24.0 GiB of 24 GB RTX 3090 .*optimizer") as error:
        llama.checked(_request("rtx3090"))
    assert "--gpus 1 --zero 2 --offload optimizer --groups 1" in str(error.value)
    offloaded = _request("rtx3090", sharding=Sharding(1, 8, 2, "optimizer"), host_memory=64 * GIB)
    with pytest.raises(ValueError, match="needs 151 GiB of host memory for offloaded states, 64 GiB are available"):
        llama.checked(offloaded)
    with pytest.raises(ValueError, match="precision = 'bf16' on 32 GB V100, which has no bfloat16"):
        llama.plan(_request("v100"))
    with pytest.raises(ValueError, match="gpu = 'a200' is not one of rtx3090"):
        find_card("a200")


def test_a_smaller_batch_is_the_nearest_plan(llama: Planner) -> None:
    request = _request("a100-80", groups=16, optimizer="kahan", settings=StepSettings("baseline"))
    with pytest.raises(ValueError, match=r"nearest plan that fits: --gpus 1 --zero 0 --offload none --groups [2-6] "):
        llama.checked(request)


def test_time_follows_products_and_traffic(llama: Planner) -> None:
    """More work takes longer, a faster card less; offload costs what is published for it (0.5 to 7 s)."""
    plain = llama.plan(_request("a100-80")).time
    baseline = llama.plan(_request("a100-80", settings=StepSettings("baseline"))).time
    assert baseline.compute / plain.compute == pytest.approx(1.68, abs=0.05)
    assert llama.plan(_request("h100-80")).time.compute < plain.compute
    offloaded = llama.plan(_request("a100-80", sharding=Sharding(1, 8, 2, "optimizer"))).time
    assert 3 < offloaded.total < 12 and plain.total < 1
    assert llama.plan(_request("a100-80", settings=StepSettings(dtype=torch.float32))).time.compute > plain.compute


def test_cards_have_what_their_name_says() -> None:
    for card in CARDS.values():
        nominal = int(card.label.split()[0])
        assert 0.92 * nominal < card.memory_gib <= nominal
        assert card.half_tflops > card.float32_tflops and card.link_gbs >= card.pcie_gbs


def test_the_comparison_is_a_table_and_plain_values() -> None:
    planner = Planner(Simulator(model_config("tiny")))
    request = PlanRequest(find_card("rtx3090"), Workload(3, 8, 8))
    rows = compare(planner, request, ["baseline", "one_pass"], most_groups=2)
    assert all(len(cells) == 2 for _, cells in plan_rows(rows))
    assert json.loads(json.dumps(rows[0].summary()))["method"] == "baseline"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    sizes = (
        "--vocab 500",
        "--hidden 64",
        "--ffn 128",
        "--layers 3",
        "--heads 4",
        "-k 3",
        "--prompt 9",
        "--response 7",
    )
    arguments = ["plan", "--most-groups", "2", *" ".join(sizes).split()]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json", str(figures), "--picture", str(picture)])
    assert ended.value.code == 0
    assert [row["method"] for row in json.loads(figures.read_text())["methods"]][-1] == "two_phase"
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as ended:
        main(["plan"])
    assert ended.value.code == 2 and "give --model" in capsys.readouterr().err


def test_command_line_on_real_records(tmp_path: Path) -> None:
    figures = tmp_path / "plan.json"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "plan",
                "--model",
                "tiny",
                "--data",
                "tuna/data/examples/ranked_demo.jsonl",
                "--most-groups",
                "2",
                "--json",
                str(figures),
            ]
        )
    assert ended.value.code == 0
    assert "groups of the data" in json.loads(figures.read_text())["title"]
