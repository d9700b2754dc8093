"""Law: no file of a checkpoint runs code, wherever it lies and whoever loads it, unless it is trusted by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tuna.train.test_durability import saving
from tests.tuna.train.test_trainer import ragged, tiny_llama
from tuna.cli import main
from tuna.models.integrity import MARKER, CheckpointError
from tuna.train.trainer import TunaTrainer
from tuna.train.trust import FORCE, FORCE_NOT, loading, tensors_only


class Code:
    """Makes a file as it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def test_nothing_runs_within_whatever_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_NOT, "1")
    torch.save(Code(tmp_path / "proof"), tmp_path / "a.pt")
    told = pytest.raises(CheckpointError, match=r"folder cannot be loaded .*--trust-checkpoint")
    with told, loading(tmp_path / "folder", trust=False):
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert not (tmp_path / "proof").exists()
    assert os.environ[FORCE_NOT] == "1" and FORCE not in os.environ
    with loading(tmp_path / "folder", trust=True):
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "proof").exists()
    with tensors_only():
        assert os.environ[FORCE] == "1"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_checkpoint_from_elsewhere_runs_nothing_on_resume(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    TunaTrainer(tiny_llama(), saving(run, save_steps=2, max_steps=2), ragged(8)).train()
    checkpoint = run / "checkpoint-2"
    (checkpoint / MARKER).unlink()
    torch.save(Code(tmp_path / "proof"), checkpoint / name)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    trainer = TunaTrainer(tiny_llama(), saving(tmp_path / "other"), ragged(8))
    with pytest.raises(CheckpointError, match=r"checkpoint-2 cannot be loaded"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("kind", ["shards", "weights", "adapter"])
def test_a_checkpoint_from_elsewhere_runs_nothing_on_export(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deepspeed")
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "global_step1").mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    code = Code(tmp_path / "proof")
    if kind == "shards":
        (checkpoint / "latest").write_text("global_step1")
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            torch.save(code, checkpoint / "global_step1" / name)
    else:
        tiny_llama().config.save_pretrained(checkpoint)
        torch.save(code, checkpoint / "pytorch_model.bin")
    more: list[str] = []
    if kind == "adapter":
        (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
        torch.save(code, checkpoint / "adapter_model.bin")
        more = ["--model", "tiny"]
    with pytest.raises(SystemExit) as done:
        main(["export", str(checkpoint), str(tmp_path / "out"), *more])
    assert done.value.code == 2 and str(checkpoint) in capsys.readouterr().err
    assert not (tmp_path / "proof").exists() and not (tmp_path / "out").exists()


def test_the_contents_of_shards_are_read_as_plain_values(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as shards

    state = {"a": torch.ones(3, dtype=torch.bfloat16), "b": {"step": 3, "c": torch.tensor(1)}}
    shards.save(state, checkpoint_id=str(tmp_path / "good" / "optimizer_0"), no_dist=True)
    with loading(tmp_path / "good", trust=False):
        pass
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / ".metadata").write_bytes(pickle.dumps(Code(tmp_path / "proof")))
    with pytest.raises(CheckpointError, match=r"bad cannot be loaded .*mkdir"), loading(tmp_path / "bad", trust=False):
        pass
    assert not (tmp_path / "proof").exists()
