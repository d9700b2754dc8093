"""Laws: SIGTERM and Ctrl-C end a run after the running step with a whole checkpoint, on all ranks, and it goes on
exactly; a second one ends it at once; a process ends with the one that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.tuna import launching
from tests.tuna.train.test_durability import At, saving
from tests.tuna.train.test_trainer import config, ragged, tiny_llama, weights
from tuna.cli.train import STOPPED
from tuna.train import checkpoints
from tuna.train.stopping import Stopped, StopSignals
from tuna.train.trainer import TunaTrainer

EXAMPLES = Path(__file__).resolve().parents[3] / "tuna" / "data" / "examples" / "ranked_demo.jsonl"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_that_is_gone_on_from_exactly(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    settings = {"save_steps": 1000, "max_steps": 6, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    trainer = TunaTrainer(tiny_llama(), saving(tmp_path, **settings), ragged(8))
    trainer.add_callback(At(3, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(Stopped, match=rf"stopped by {number.name} after step 3; .*checkpoint-3 is complete"):
        trainer.train()
    assert signal.getsignal(number) == before
    assert checkpoints.newest(tmp_path) == (tmp_path / "checkpoint-3", [])
    again = TunaTrainer(tiny_llama(seed=5), saving(tmp_path, **settings), ragged(8))
    again.train(resume_from_checkpoint=True)
    straight = TunaTrainer(tiny_llama(), saving(tmp_path / "straight", **settings), ragged(8))
    straight.train()
    for name, value in weights(straight.model).items():
        assert torch.equal(weights(again.model)[name], value), name


def test_a_run_that_saves_nothing_says_so(tmp_path: Path) -> None:
    trainer = TunaTrainer(tiny_llama(), config(tmp_path, max_steps=4), ragged(8))
    trainer.add_callback(At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped, match="nothing was saved"):
        trainer.train()
    assert checkpoints.numbered(tmp_path) == []


def test_a_second_signal_ends_at_once_unless_it_is_the_launchers_echo() -> None:
    script = """
import os, signal, sys
from tuna.train.stopping import StopSignals
with StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM"
    os.kill(os.getpid(), signal.SIGTERM)
    print("went on")
"""
    for ranks, code in (("1", -signal.SIGTERM), ("2", 0)):
        env = {**launching.environment(), "WORLD_SIZE": ranks}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "SIGTERM: stopping after this step" in done.stderr


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_ends_with_a_code_that_is_not_success(tmp_path: Path) -> None:
    words = f"train --model tiny --data {EXAMPLES} --max-length 64 --steps 400 --save-steps 1000 --lr 1e-4"
    process = launching.start(
        0, "tuna", *words.split(), "--logging-steps", "1", "--output", str(tmp_path / "run"), cwd=tmp_path
    )
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") > 1, process)
    process.send_signal(signal.SIGTERM)
    code, output = launching.finish(process, 120)
    assert code == STOPPED, output
    assert "the same command with --resume continues from there" in output
    assert checkpoints.last_complete(tmp_path / "run") is not None


def wait_for(condition: object, process: subprocess.Popen[str], timeout: float = 120) -> None:
    assert callable(condition)
    until = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def test_ranks_agree_to_stop_though_one_alone_was_told(tmp_path: Path) -> None:
    words = ("tests.tuna.train.stopped_rank", str(tmp_path / "run"), "6")
    code, output = launching.finish(launching.start(2, *words, "stop", cwd=tmp_path), 200)
    assert code != 0, output
    found = checkpoints.last_complete(tmp_path / "run")
    assert found is not None and found.name in ("checkpoint-3", "checkpoint-4"), output
    launching.run(2, words[0], [*words[1:], "go on"], tmp_path)
    launching.run(2, words[0], [str(tmp_path / "straight"), "6", "go on"], tmp_path)
    expected, again = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "run"))
    assert all(again[name].equal(value) for name, value in expected.items())


def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    process = launching.start(2, "tests.tuna.train.stopped_rank", str(tmp_path), "100000", "go on", cwd=tmp_path)
    ranks: list[psutil.Process] = []
    try:
        wait_for((tmp_path / "going").exists, process)
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.kill()  # the launcher alone
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert alive == []
        assert checkpoints.last_complete(tmp_path) is not None
    finally:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        launching.kill(process)
        process.communicate()


PARENT = """
import subprocess, sys, time
from tuna.system import lifeline
child = lifeline.start([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
time.sleep(60)
"""
CHILD = """
import time
from tuna.system import lifeline
lifeline.watch_parent()
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], env=launching.environment(), stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline().split()[0]))
    parent.send_signal(number)
    parent.communicate()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert alive == []
