"""Laws: a checkpoint is whole or not there, at whatever moment a run is ended; a run that goes on ends in the same
weights, also on another number of ranks; a full disk and a loss that is no number stop the run and harm nothing.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.tuna import launching
from tests.tuna.train.test_trainer import config, ragged, tiny_llama, weights
from tests.tuna.train.zero_cases import EXAMPLES, STAGES
from tuna.cli import main
from tuna.models.integrity import MARKER, CheckpointError
from tuna.train import checkpoints
from tuna.train.checkpoints import Shape
from tuna.train.trainer import TunaTrainer

SHAPE = Shape(ranks=2, zero_stage=2, batches_a_step=4)


class Crash(BaseException):
    """What no code catches: the process is gone."""


def draft(run: Path, step: int, text: str) -> Path:
    """A checkpoint as the stock trainer leaves it in the draft folder."""
    folder = run / checkpoints.DRAFT / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "model.bin").write_text(text)
    (folder / "global_step" / "rank0.bin").write_text(text)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


@pytest.mark.parametrize("again", [False, True], ids=["new", "written-before"])
def test_a_crash_at_any_system_call_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    last = 3 if again else 5
    for crash_at in range(1, 100):
        run = tmp_path / str(crash_at)
        checkpoints.publish(draft(run, 3, "old"), run / "checkpoint-3", SHAPE)
        new = draft(run, last, "new")
        calls = 0

        def crashing(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == crash_at:  # noqa: B023  # used within the iteration
                    raise Crash
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (os, "open"), (os, "rename"), (Path, "rename"), (Path, "replace")):
                patch.setattr(owner, name, crashing(getattr(owner, name)))
            patch.setattr(shutil, "rmtree", crashing(shutil.rmtree))
            try:
                checkpoints.publish(new, run / f"checkpoint-{last}", SHAPE)
                finished = True
            except Crash:
                finished = False
        checkpoints.remove_drafts(run)
        found = checkpoints.last_complete(run)
        assert found is not None
        texts = {(found / "model.bin").read_text(), (found / "global_step" / "rank0.bin").read_text()}
        assert len(texts) == 1
        assert not (run / checkpoints.DRAFT).exists()
        if finished:
            assert texts == {"new"} and found.name == f"checkpoint-{last}"
            break
    assert finished and crash_at > 8


def test_a_checkpoint_that_lost_a_file_is_passed_over(tmp_path: Path) -> None:
    for step in (9, 10):
        checkpoints.publish(draft(tmp_path, step, "x"), tmp_path / f"checkpoint-{step}", SHAPE)
    assert checkpoints.last_complete(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "model.bin").write_text("")  # cut to nothing, as after a power cut
    assert checkpoints.last_complete(tmp_path) == tmp_path / "checkpoint-9"
    (tmp_path / "checkpoint-9" / MARKER).unlink()
    assert checkpoints.last_complete(tmp_path) is None


def test_another_step_size_is_refused(tmp_path: Path) -> None:
    checkpoints.publish(draft(tmp_path, 1, "x"), tmp_path / "checkpoint-1", SHAPE)
    checkpoint = tmp_path / "checkpoint-1"
    assert not checkpoints.check_shape(checkpoint, SHAPE)
    assert checkpoints.check_shape(checkpoint, Shape(ranks=1, zero_stage=1, batches_a_step=4))
    with pytest.raises(CheckpointError, match=r"4 micro-batches per step \(2 ranks x 2\), this run has 2"):
        checkpoints.check_shape(checkpoint, Shape(ranks=1, zero_stage=2, batches_a_step=2))
    with pytest.raises(CheckpointError, match="under ZeRO-1 or 2, this run is without DeepSpeed"):
        checkpoints.check_shape(checkpoint, Shape(ranks=2, zero_stage=0, batches_a_step=4))
    with pytest.raises(CheckpointError, match="under ZeRO-1 or 2, this run is under ZeRO-3"):
        checkpoints.check_shape(checkpoint, Shape(ranks=2, zero_stage=3, batches_a_step=4))


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.action()


def saving(folder: Path, **changes: Any) -> Any:
    return config(folder, **{"save_strategy": "steps", "save_steps": 1, "max_steps": 4, **changes})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_weights_move(tmp_path: Path, accumulate: int) -> None:
    model, groups = tiny_llama(), ragged(8)
    trainer = TunaTrainer(model, saving(tmp_path, gradient_accumulation_steps=accumulate, max_steps=8), groups)
    order = [batch["ids"][0] for batch in trainer.get_train_dataloader()]
    bad = order[2 * accumulate]  # in the first micro-batch of step 3
    tokens = groups[int(bad)].group.prompt
    before: dict[str, torch.Tensor] = {}

    def poison() -> None:
        model.model.embed_tokens.weight.data[tokens] = float("nan")
        before.update(weights(model))

    trainer.add_callback(At(2, poison))
    with pytest.raises(FloatingPointError, match=f"non-finite loss at step 3.*records.* {bad}"):
        trainer.train()
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_no_number_never_gets_into_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = TunaTrainer(model, saving(tmp_path), ragged(8))

    def poison() -> None:
        model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("inf"))

    trainer.add_callback(At(2, poison))
    with pytest.raises(FloatingPointError, match="non-finite gradient at step 3"):
        trainer.train()
    found = checkpoints.last_complete(tmp_path)
    assert found == tmp_path / "checkpoint-2"
    assert all(value.isfinite().all() for value in load_file(found / "model.safetensors").values())
    assert all(value.isfinite().all() for value in weights(model).values())


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = TunaTrainer(tiny_llama(), saving(tmp_path), ragged(8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 2000 bytes from here on: the write itself fails, as on a full disk.
    trainer.add_callback(At(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written .*checkpoint-1 is complete"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "run.json"]
    again = TunaTrainer(tiny_llama(seed=5), saving(tmp_path), ragged(8))
    again.train(resume_from_checkpoint=True)
    straight = TunaTrainer(tiny_llama(), config(tmp_path / "straight", max_steps=4), ragged(8))
    straight.train()
    for name, value in weights(straight.model).items():
        assert torch.equal(weights(again.model)[name], value), name


def test_resume_without_a_checkpoint_begins(tmp_path: Path) -> None:
    trainer = TunaTrainer(tiny_llama(), saving(tmp_path, max_steps=1, save_total_limit=1), ragged(4))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1


def test_a_finished_run_that_goes_on_takes_no_step(tmp_path: Path) -> None:
    first = TunaTrainer(tiny_llama(), saving(tmp_path, max_steps=3), ragged(8))
    first.train()
    again = TunaTrainer(tiny_llama(seed=5), saving(tmp_path, max_steps=3), ragged(8))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert [path.name for path in tmp_path.glob("checkpoint-4")] == []
    for name, value in weights(first.model).items():
        assert torch.equal(weights(again.model)[name], value), name


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    settings = saving(
        tmp_path,
        max_steps=5,
        save_total_limit=2,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer = TunaTrainer(tiny_llama(), settings, ragged(8), ragged(8))
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.parent == tmp_path and checkpoints.fault(best) is None
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {best.name, "checkpoint-5"} or (best.name == "checkpoint-5" and len(kept) == 2)


def test_export_of_a_plain_checkpoint(tmp_path: Path) -> None:
    trainer = TunaTrainer(tiny_llama(), saving(tmp_path / "run", max_steps=2), ragged(4))
    trainer.train()
    with pytest.raises(SystemExit) as done:
        main(["export", str(tmp_path / "run"), str(tmp_path / "plain"), "--dtype", "float32"])
    assert done.value.code == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for name, value in weights(trainer.model).items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(SystemExit) as done:
        main(["export", str(tmp_path / "run"), str(tmp_path / "plain")])
    assert done.value.code == 2


# Real processes


def train_command(folder: Path, stage: int, steps: int, *more: str) -> list[str]:
    """The words of ``tuna train`` for a tiny model under ZeRO."""
    settings = folder.parent / f"zero{stage}.json"
    zero = {**STAGES[stage], "stage3_gather_16bit_weights_on_model_save": True}
    settings.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto"}))
    words = f"train --model tiny --data {EXAMPLES} --limit 24 --max-length 128 --steps {steps} --save-steps 1"
    words += f" --output {folder} --deepspeed {settings} --logging-steps 1 --lr 1e-3 --resume"
    return [*words.split(), "--set", "save_total_limit=3", *more]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_five_times_it_ends_in_the_same_weights(tmp_path: Path, stage: int) -> None:
    steps = 60
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    launching.run(2, "tuna", train_command(straight, stage, steps), cwd=tmp_path, timeout=900)
    seed = random.randrange(2**32)
    moment = random.Random(seed)
    places = []
    for _ in range(5):
        before = checkpoints.last_complete(killed) if killed.exists() else None
        process = launching.start(2, "tuna", *train_command(killed, stage, steps), cwd=tmp_path)
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if killed.exists() and checkpoints.last_complete(killed) != before:
                break
            time.sleep(0.01)
        assert process.poll() is None, f"ended by itself (seed {seed}): {process.communicate()[0][-3000:]}"
        time.sleep(moment.uniform(0, 0.4))
        launching.kill(process)
        process.communicate()
        last = checkpoints.last_complete(killed)
        assert last is not None
        places.append(int(last.name.partition("-")[2]))
    assert places == sorted(places) and places[-1] < steps, places
    launching.run(2, "tuna", train_command(killed, stage, steps), cwd=tmp_path, timeout=900)
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight, killed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} differs (seed {seed}, killed after steps {places})"
    lines = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/rank" in line and "eval_loss" not in line] == list(
        range(1, steps + 1)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "then", "ranks", "lora"),
    [(1, 1, 1, 0), (2, 2, 1, 0), (1, 2, 4, 0), (3, 3, 1, 0), (3, 3, 4, 0), (3, 3, 1, 4)],
    ids=lambda value: str(value),
)
def test_going_on_with_another_number_of_ranks(tmp_path: Path, stage: int, then: int, ranks: int, lora: int) -> None:
    # Norms and biases have no weight decay: two groups of parameters, so two steps to count, where all are trained.
    more = ["--set", "weight_decay=0.1"]
    more += ["--lora-r", str(lora), "--lora-targets", "q_proj,v_proj"] if lora else []
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    words = [*train_command(straight, stage, 5, *more), "--accumulate", "2"]
    launching.run(2, "tuna", words, cwd=tmp_path, timeout=900)
    shutil.copytree(straight, moved)
    for step in (4, 5):
        shutil.rmtree(moved / f"checkpoint-{step}")
    words = [*train_command(moved, then, 5, *more), "--accumulate", str(4 // ranks)]
    launching.run(ranks, "tuna", words, cwd=tmp_path, timeout=900)
    compare(load_file(moved / "model.safetensors"), load_file(straight / "model.safetensors"))
    assert (moved / "checkpoint-3" / "latest_universal").exists()
    # And the checkpoint that ZeRO wrote in shards is the model that was saved whole.
    words = ["--model", "tiny"] if lora else []
    launching.run(0, "tuna", ["export", str(moved), str(tmp_path / "plain"), *words], cwd=tmp_path, timeout=900)
    compare(load_file(tmp_path / "plain" / "model.safetensors"), load_file(moved / "model.safetensors"))


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
