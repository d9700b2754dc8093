"""Laws: the log file holds one line of JSON an entry, each step once, also where a killed run went on."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tuna.train.test_trainer import config, ragged, tiny_llama
from tuna.train.logs import LOG_FILE, JsonLines
from tuna.train.trainer import TunaTrainer


def train(folder: Path, steps: int, *, resume: bool) -> None:
    settings = config(folder, max_steps=steps, save_strategy="steps", save_steps=2, report_to=["tensorboard"])
    trainer = TunaTrainer(tiny_llama(), settings, ragged(8), ragged(4))
    trainer.add_callback(JsonLines(folder / LOG_FILE, fresh=not resume))
    if not resume:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def test_every_step_stands_once(tmp_path: Path) -> None:
    train(tmp_path, 3, resume=False)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 3]  # the last is about the run
    assert "eval_loss" in lines(tmp_path)[0] and "loss/rank" in lines(tmp_path)[1]
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 3, "lo')  # cut by a kill
    (tmp_path / "checkpoint-3").rename(tmp_path / "elsewhere")  # so that it goes on from step 2
    before = lines_of_step(tmp_path, 2)
    train(tmp_path, 5, resume=True)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5]
    assert lines_of_step(tmp_path, 2) == before
    assert list(tmp_path.glob("runs/*/events*"))  # TensorBoard's


def test_a_fresh_run_begins_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, 1, resume=False)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1]


def lines_of_step(folder: Path, step: int) -> list[str]:
    texts = (folder / LOG_FILE).read_text().splitlines()
    return [text for text in texts if text.startswith(f'{{"step": {step},')]
