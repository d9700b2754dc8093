"""Laws of what `tuna plan` advises: commands that exist, with the plan's own settings; names as people write them."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuna.cli import main
from tuna.plan.advice import adapters, train_command
from tuna.plan.cards import CARDS, find_card
from tuna.plan.planner import Planner
from tuna.plan.settings import PlanRequest, Sharding, StepSettings
from tuna.plan.simulate import Simulator
from tuna.plan.sizes import model_config
from tuna.plan.workload import Workload

READING: dict[str, Any] = {"data": None, "template": "none", "max_length": 512}
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tiny() -> Planner:
    return Planner(Simulator(model_config("tiny")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["--dtype", "bf16=true", "memory=one_pass", "gradient_checkpointing=true"][1:]),
        ({"groups": 3}, ["--groups 3"]),
        ({"optimizer": "kahan"}, ["--dtype bfloat16", "optim=adamw_kahan"]),
        ({"settings": StepSettings("two_phase", lora_rank=8, candidates_per_pass=2)},
         ["--lora-r 8", "memory=two_phase", "candidates_per_pass=2", "--dtype bfloat16"]),
        ({"settings": StepSettings("unshared")}, ["--share none"]),
        ({"sharding": Sharding(1, 8, 2, "optimizer")}, ["tuna train", "configs/deepspeed/zero2_offload.yaml"]),
        ({"sharding": Sharding(16, 8, 3, "all")},
         ["torchrun --nnodes 2 --nproc_per_node 8 -m tuna train", "zero3_offload_all.yaml"]),
    ],
)  # fmt: skip
def test_the_command_has_the_settings_of_the_plan(tiny: Planner, changes: dict[str, Any], words: list[str]) -> None:
    request = replace(PlanRequest(find_card("rtx3090"), Workload(3, 8, 8)), **changes)
    command = train_command(tiny.plan(request), "tiny", **READING)
    assert all(word in command for word in words), command
    assert "--max-length 16" in command
    real = train_command(tiny.plan(request), "tiny", data="a.jsonl", template=None, max_length=64)
    assert "--template" not in real and "--data a.jsonl" in real  # the model's own, here as there
    given = shlex.split(command)
    if "--deepspeed" in given:
        assert (REPOSITORY / given[given.index("--deepspeed") + 1]).is_file()


def test_the_command_trains(tiny: Planner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}\n')
    request = PlanRequest(find_card("rtx3090"), Workload(2, 8, 8), settings=StepSettings(lora_rank=2))
    plan = tiny.plan(request)
    words = shlex.split(train_command(plan, "tiny", data=str(data), template="none", max_length=64))
    words[words.index("FOLDER")] = str(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--yes", "--set", "use_cpu=true"])
    assert ended.value.code == 0, capsys.readouterr()


def test_adapters_stand_beside_offload(capsys: pytest.CaptureFixture[str]) -> None:
    planner = Planner(Simulator(model_config("llama-7b")))
    request = PlanRequest(find_card("4090"), Workload(5, 64, 64))
    found = adapters(planner, request)
    assert found is not None and found.fits and found.request.sharding.offload == "none"
    assert adapters(planner, found.request) is None
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", "meta-llama/Llama-2-7b-hf", "--gpu", "4090", "--prompt", "64", "--response", "64"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and "nearest plan that fits: --gpus 1 --zero 2 --offload optimizer" in said.err
    assert "--deepspeed configs/deepspeed/zero2_offload.yaml" in said.out and "--lora-r 16" in said.out


@pytest.mark.parametrize(
    ("name", "card"),
    [("4090", "rtx4090"), ("RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 3090", "rtx3090"), ("h100", "h100-80"),
     ("NVIDIA A100-SXM4-40GB", "a100-40"), ("A100 80GB", "a100-80"), ("NVIDIA H100 80GB HBM3", "h100-80"),
     ("Tesla V100-SXM2-32GB", "v100"), ("RTX A6000", "a6000"), ("NVIDIA L40S", "l40s")],
)  # fmt: skip
def test_cards_are_known_by_what_they_are_called(name: str, card: str) -> None:
    assert find_card(name) is CARDS[card]


@pytest.mark.parametrize("name", ["", "80", "100", "3090 ti", "v100-16", "a10", "RTX 6000 Ada", "4090 48GB"])
def test_other_cards_are_not_taken_for_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="is not one of rtx3090"):
        find_card(name)


def test_a_card_of_several_sizes_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"gpu = 'a100' is not one of a100-40, a100-80$"):
        find_card("a100")


@pytest.mark.parametrize(
    ("name", "size"),
    [("meta-llama/Llama-2-7b-hf", "llama-7b"), ("meta-llama/Llama-2-13b-chat-hf", "llama-13b"),
     ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b"), ("huggyllama/llama-7b", "llama-7b"),
     ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b")],
)  # fmt: skip
def test_names_on_the_hub_are_understood(name: str, size: str) -> None:
    assert model_config(name).to_dict() == model_config(size).to_dict()
