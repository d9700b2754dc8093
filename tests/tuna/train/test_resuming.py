"""Laws: a run that goes on honours and tells what may differ, refuses by old and new value what may not, and one that
goes on unchanged says nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tuna.train.test_cli_train import EXAMPLES, invoke
from tests.tuna.train.test_trainer import config, ragged, tiny_llama
from tuna.models.integrity import CheckpointError
from tuna.train import resuming
from tuna.train.trainer import TunaTrainer

RATE = 1e-2


def settings(folder: Path, **changes: Any) -> Any:
    defaults = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "lr_scheduler_type": "cosine"}
    return config(folder, **{**defaults, "learning_rate": RATE, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that got to step 4 of 8."""
    folder = tmp_path_factory.mktemp("run")
    TunaTrainer(tiny_llama(), settings(folder), ragged(8)).train()
    for step in (6, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def go_on(folder: Path, groups: Any = None, model: Any = None, **changes: Any) -> list[dict[str, float]]:
    """Go on; the log of the steps from then on."""
    trainer = TunaTrainer(model or tiny_llama(seed=5), settings(folder, **changes), groups or ragged(8))
    trainer.train(resume_from_checkpoint=True)
    return [line for line in trainer.state.log_history if "loss/rank" in line and line["step"] > 4]


def cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def test_an_unchanged_run_goes_on_without_a_word(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = go_on(copied)
    assert [line["step"] for line in lines] == [5, 6, 7, 8]
    assert "differ" not in caplog.text
    expected = [RATE * cosine(step, 8) for step in range(4, 8)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"learning_rate": 1e-4}, lambda step: 1e-4 * cosine(step, 8)),
        ({"lr_scheduler_type": "constant"}, lambda step: RATE),
        ({"max_steps": 16}, lambda step: RATE * cosine(step, 16)),
        ({"warmup_steps": 6}, lambda step: RATE * min(step / 6, cosine(max(0, step - 6), 2))),
        ({"learning_rate": 1e-4, "lr_scheduler_type": "linear"}, lambda step: 1e-4 * (8 - step) / 8),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_schedule_holds_from_the_next_step_on_and_is_told(
    copied: Path, changes: dict[str, Any], rate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lines = go_on(copied, **changes)[:4]
    assert [line["learning_rate"] for line in lines] == pytest.approx([rate(step) for step in range(4, 8)])
    for name, value in changes.items():
        before = {"learning_rate": RATE, "lr_scheduler_type": "cosine", "max_steps": 8, "warmup_steps": 0}[name]
        assert f"{name}: {before} before, {value} now" in caplog.text


def test_another_weight_decay_reaches_the_optimizer(copied: Path) -> None:
    trainer = TunaTrainer(tiny_llama(), settings(copied, weight_decay=0.3, adam_beta2=0.9), ragged(8))
    trainer.train(resume_from_checkpoint=True)
    groups: Any = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert {group["betas"] for group in groups} == {(0.9, 0.9)}


def test_another_period_of_saving_holds(copied: Path) -> None:
    go_on(copied, save_steps=3)
    assert sorted(path.name for path in copied.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"groups": ragged(8)[::-1]}, "data: the same 8 groups in another order"),
        ({"groups": ragged(6)}, "data: 8 groups before, 6 now"),
        ({"groups": ragged(8, seed=1)}, "data: 8 groups before, 8 different ones now"),
        ({"seed": 7}, "seed: 42 before, 7 now"),
        ({"data_seed": 7}, "data_seed: none before, 7 now"),
        ({"preset": "released"}, "preset: paper before, released now"),
        ({"margin": 0.2}, r"margin: 0\.1 before, 0\.2 now"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size: 1 before, 2 now"),
        ({"tokens_per_batch": 64}, "tokens_per_batch: none before, 64 now"),
        ({"share": "none"}, "share: tree before, none now"),
        ({"model": tiny_llama().double()}, r'dtype: \["float32"\] before, \["float64"\] now'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_another_run_is_refused_by_its_old_and_new_value(
    copied: Path, changes: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)checkpoint-4 differs from this run:.*{told}.*--allow-changes"):
        go_on(copied, **changes)
    if "model" not in changes:
        go_on(copied, allow_changes=True, **changes)
        assert "the new ones apply from step 5 on" in caplog.text


def lora(rank: int, **more: Any) -> Any:
    return get_peft_model(tiny_llama(seed=more.pop("seed", 0)), LoraConfig(r=rank, target_modules=["q_proj"], **more))


def test_another_kind_of_run_is_refused(copied: Path, tmp_path: Path) -> None:
    for changes in ({"model": lora(4)}, {"optim": "adafactor"}, {"optim": "adamw_kahan"}):
        for allowed in (False, True):
            with pytest.raises(CheckpointError, match=r"(?s)by a different kind of run:.*start a new run"):
                go_on(copied, allow_changes=allowed, **changes)
    adapted = tmp_path / "adapted"
    TunaTrainer(lora(2), settings(adapted, max_steps=4), ragged(8)).train()
    for model, told in (
        (lora(4), "kind of run:\n  weights.*\n  adapter"),
        (tiny_llama(), "kind of run:\n"),
        (lora(2, lora_alpha=64), "lora_alpha: 8 before, 64 now"),
        (lora(2, seed=1), "different weights under the adapter"),
    ):
        with pytest.raises(CheckpointError, match=told):
            go_on(adapted, model=model)


def test_a_schedule_that_lives_on_what_it_saw_takes_no_other_rate(tmp_path: Path) -> None:
    more = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    more |= {"metric_for_best_model": "loss"}
    TunaTrainer(tiny_llama(), settings(tmp_path, **more), ragged(8), ragged(4)).train()
    trainer = TunaTrainer(tiny_llama(), settings(tmp_path, **{**more, "learning_rate": 1e-5}), ragged(8), ragged(4))
    with pytest.raises(CheckpointError, match=r"learning_rate: 0.01 before and changed since by reduce_lr_on_plateau"):
        trainer.train(resume_from_checkpoint=True)


def test_fewer_steps_than_are_done_are_refused(copied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"max_steps = 3, but .*checkpoint-4 is already at step 4"):
        go_on(copied, max_steps=3)


def test_a_checkpoint_without_its_optimizer_is_a_model_and_no_place_to_go_on_from(tmp_path: Path) -> None:
    TunaTrainer(tiny_llama(), settings(tmp_path, max_steps=2, save_only_model=True), ragged(8)).train()
    with pytest.raises(CheckpointError, match=r"no optimizer \(save_only_model\).*--model .*checkpoint-2"):
        go_on(tmp_path)


def test_a_named_checkpoint_is_gone_on_from_and_later_ones_are_kept_apart(run: Path, copied: Path) -> None:
    for wanted, folder in ((copied / "checkpoint-2", copied), (run / "checkpoint-4", copied.with_name("new"))):
        trainer = TunaTrainer(tiny_llama(seed=3), settings(folder, max_steps=5), ragged(8))
        trainer.train(resume_from_checkpoint=str(wanted))
        assert trainer.state.global_step == 5
    assert (copied / "set-aside" / "checkpoint-4").is_dir()


def test_settings_of_another_version_of_the_program_are_not_compared() -> None:
    found = resuming.compare({"seed": 1, "gone": 2}, {"seed": 1, "new": 3, "data": {"groups": 1}})
    assert found == resuming.Differences([], [], [], frozenset())


def test_data_is_known_by_tokens_and_order_of_ranks_alone() -> None:
    described = resuming.describe_data(ragged(8), {"limit": 3})
    assert described == json.loads(json.dumps(described))
    assert described["content"] == resuming.describe_data(ragged(8)[::-1], {})["content"]
    assert described["order"] != resuming.describe_data(ragged(8)[::-1], {})["order"]
    groups = ragged(2)
    scores = groups[1].group.scores
    scaled = type(groups[1].group)(
        groups[1].group.prompt, groups[1].group.responses, scores=[10 * s + 1 for s in scores]
    )
    other = [groups[0], type(groups[1])("renamed", scaled, 0)]
    assert resuming.describe_data(other, {})["order"] == resuming.describe_data(groups, {})["order"]


def test_on_the_command_line(tmp_path: Path) -> None:
    words = ["train", "--model", "tiny", "--data", str(EXAMPLES), "--max-length", "64", "--lr", "1e-3", "--steps", "4"]
    words += ["--save-steps", "2", "--output", str(tmp_path / "run")]
    assert invoke(*words, "--limit", "12").exit_code == 0
    done = invoke(*words, "--limit", "12")
    assert isinstance(done.exception, ValueError) and "--resume continues it" in str(done.exception)
    done = invoke(*words, "--limit", "9", "--resume")
    assert isinstance(done.exception, CheckpointError)
    assert "data: 12 groups before, 9 now (limit: 12 before, 9 now)" in str(done.exception)
    done = invoke(*words, "--limit", "9", "--resume", "--allow-changes")
    assert done.exit_code == 0, done.output
    assert torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
