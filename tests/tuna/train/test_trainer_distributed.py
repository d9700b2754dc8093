"""Law: two processes give the steps, the log and the evaluation of one, whatever is left over for which."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import json, os, sys

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tuna.train.config import TunaConfig
from tuna.train.distributed import end_ranks
from tuna.data.tokenization import TokenizedGroup
from tuna.train.trainer import TunaTrainer
from tuna_kernels import Group

rng = np.random.default_rng(0)
tokens = lambda most: rng.integers(3, 61, rng.integers(1, most + 1))
groups = [
    TokenizedGroup(str(i), Group(tokens(6), [tokens(9) for _ in range(1 + i % 4)], ranks=range(1 + i % 4)), 0)
    for i in range(7)
]


def train(name, settings):
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, **dropout, **sizes)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    args = TunaConfig(
        output_dir=sys.argv[2], use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
        max_grad_norm=0.0, num_train_epochs=2, eval_strategy="epoch", **settings,
    )
    trainer = TunaTrainer(model, args, groups, groups, optimizers=(optimizer, schedule))
    assert trainer.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(model.state_dict(), f"{sys.argv[2]}/{name}.pt")
        with open(f"{sys.argv[2]}/{name}.json", "w") as file:
            json.dump(trainer.state.log_history, file)


for name, settings in json.loads(sys.argv[1]).items():
    train(name, settings)
end_ranks()
"""

# 7 groups in steps of 4: the last step has 3, so one rank gets a micro-batch that only keeps it in step.
TOKENS = {"tokens_per_batch": 60, "share": "none"}
WHOLE = {
    "paper": {"preset": "paper", "per_device_train_batch_size": 4},
    "released": {"preset": "released", "per_device_train_batch_size": 4},
    "tokens": TOKENS,
    "two_phase": {"preset": "paper", "memory": "one_pass", "margin": 0.05, "per_device_train_batch_size": 4},
}
HALF = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
SPLIT = {
    "paper": {"preset": "paper", **HALF},
    "released": {"preset": "released", **HALF},
    "tokens": TOKENS,
    # 0.05 leaves some candidates without a gradient, so ranks have different numbers of passes
    "two_phase": {"preset": "paper", "memory": "two_phase", "margin": 0.05, **HALF},
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("one"), 1, WHOLE)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("two"), 2, SPLIT)


def launch(folder: Path, processes: int, cases: dict[str, dict[str, Any]]) -> Path:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, str(script), json.dumps(cases), str(folder)],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def log(folder: Path, case: str) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = json.loads((folder / f"{case}.json").read_text())
    return lines


@pytest.mark.parametrize("preset", ["paper", "released", "two_phase"])
def test_two_processes_equal_one(one_process: Path, two_processes: Path, preset: str) -> None:
    weights = torch.load(two_processes / f"{preset}.pt")
    for name, value in torch.load(one_process / f"{preset}.pt").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-12, msg=name)
    # Losses are summed by the stock trainer in float32, and padding differs with the micro-batch.
    left_out = ("tokens/s", "tokens/padded", "runtime", "per_second", "total_flos")
    for expected, line in zip(log(one_process, preset), log(two_processes, preset), strict=True):
        assert expected.keys() == {name for name in line if not name.startswith("memory/")}
        for name, figure in expected.items():
            if not any(part in name for part in left_out):
                assert line[name] == pytest.approx(figure, rel=1e-6, abs=1e-9), name


def test_token_batches_on_two_processes_see_every_group_once(one_process: Path, two_processes: Path) -> None:
    totals = {
        sum(line.get("tokens/computed", 0) for line in log(folder, "tokens") if epoch - 1 < line["epoch"] <= epoch)
        for folder in (one_process, two_processes)
        for epoch in (1, 2)
    }
    assert len(totals) == 1 and totals.pop() > 0
    assert len(log(two_processes, "tokens")) < len(log(one_process, "tokens"))
