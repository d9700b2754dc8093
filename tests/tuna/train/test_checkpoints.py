"""Laws: a checkpoint with any file changed, missing, added or swapped is passed over, with the file's name; one of
another run is never taken; nothing that is passed over is lost."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tuna.train.test_durability import SHAPE, draft
from tuna.models.integrity import MARKER, CheckpointError
from tuna.system import manifest
from tuna.train import checkpoints
from tuna.train.checkpoints import RUN_FILE, SET_ASIDE


def run_of(folder: Path, *steps: int) -> str:
    """A run with whole checkpoints; returns its name."""
    name = checkpoints.begin_run(folder)
    for step in steps:
        checkpoints.publish(draft(folder, step, str(step)), folder / f"checkpoint-{step}", SHAPE, run=name)
    return name


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda at: flip(at / "global_step" / "rank0.bin"), "global_step/rank0.bin is damaged: its content"),
    "cut": (lambda at: (at / "model.bin").write_text(""), "model.bin is damaged: 0 bytes instead of 1"),
    "missing": (lambda at: (at / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "folder": (lambda at: ((at / "model.bin").unlink(), (at / "model.bin").mkdir()), "model.bin is missing"),
    "added": (lambda at: (at / "adapter_model.safetensors").write_text("x"), "adapter_model.safetensors is not listed"),
    "swapped": (lambda at: shutil.copy(at.with_name("checkpoint-1") / "model.bin", at), "model.bin is damaged"),
    "list": (lambda at: flip(at / MARKER), "complete.json"),
    "no list": (lambda at: (at / MARKER).unlink(), "complete.json is missing"),
    "list of another": (lambda at: shutil.copy(at.with_name("checkpoint-1") / MARKER, at), "is damaged"),
    "old list": (lambda at: (at / MARKER).write_text('{"files": {"model.bin": 1}}'), "complete.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_the_name_of_its_file(tmp_path: Path, kind: str) -> None:
    damage, told = DAMAGES[kind]
    run_of(tmp_path, 1, 2)
    assert checkpoints.newest(tmp_path) == (tmp_path / "checkpoint-2", [])
    damage(tmp_path / "checkpoint-2")
    found, faults = checkpoints.newest(tmp_path)
    assert found == tmp_path / "checkpoint-1"
    assert len(faults) == 1 and told in faults[0] and str(tmp_path / "checkpoint-2") in faults[0]


def test_notes_beside_the_files_do_no_harm(tmp_path: Path) -> None:
    run_of(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "notes.md").write_text("good one")
    (tmp_path / "checkpoint-1" / ".DS_Store").write_text("")
    assert checkpoints.fault(tmp_path / "checkpoint-1") is None


def test_a_renamed_checkpoint_is_not_one_of_another_step(tmp_path: Path) -> None:
    run_of(tmp_path, 1, 2)
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-9")
    found, faults = checkpoints.newest(tmp_path)
    assert found == tmp_path / "checkpoint-2" and "is the checkpoint of step 1" in faults[0]


def test_a_checkpoint_of_another_run_is_never_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_of(tmp_path, 1, 16)
    assert run_of(tmp_path, 4) == checkpoints.run_name(tmp_path)
    assert checkpoints.newest(tmp_path) == (tmp_path / "checkpoint-4", [])
    kept = sorted(path.name for path in (tmp_path / SET_ASIDE).iterdir())
    assert kept == ["checkpoint-1", "checkpoint-16"] and "was moved to" in caplog.text
    shutil.copytree(tmp_path / SET_ASIDE / "checkpoint-16", tmp_path / "checkpoint-16")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest(tmp_path) == (tmp_path / "checkpoint-4", [])
    assert "checkpoint-16 belongs to another run" in caplog.text


def test_what_is_not_gone_on_from_is_kept_apart(tmp_path: Path) -> None:
    name = run_of(tmp_path, 1, 2, 3)
    flip(tmp_path / "checkpoint-3" / "model.bin")
    assert checkpoints.go_on(tmp_path, tmp_path / "checkpoint-2") == name
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    assert (tmp_path / SET_ASIDE / "checkpoint-3").is_dir()


def test_a_run_without_its_name_takes_that_of_its_checkpoints(tmp_path: Path) -> None:
    name = run_of(tmp_path, 1, 2)
    (tmp_path / RUN_FILE).unlink()
    assert checkpoints.run_name(tmp_path) == name
    other = run_of(tmp_path / "other", 7)
    shutil.copytree(tmp_path / "other" / "checkpoint-7", tmp_path / "checkpoint-7")
    assert other != name
    with pytest.raises(CheckpointError, match=r"run.json is missing and the checkpoints .* belong to 2 runs"):
        checkpoints.newest(tmp_path)
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json is damaged"):
        checkpoints.newest(tmp_path)


def test_writing_over_a_run_leaves_none_of_its_checkpoints(tmp_path: Path) -> None:
    before = run_of(tmp_path, 1, 16)
    assert checkpoints.begin_run(tmp_path, clear=True) != before
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


def test_a_list_says_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    manifest.write(tmp_path, "list.json", {"x": 1.5}, [tmp_path / "a.bin"])
    assert manifest.read(tmp_path, "list.json")["x"] == 1.5
    text = (tmp_path / "list.json").read_text()
    (tmp_path / "list.json").write_text(text.replace("1.5", "1.6"))
    with pytest.raises(ValueError, match=r"list.json is damaged"):
        manifest.read(tmp_path, "list.json")
    for wrong in (
        "[]",
        "null",
        "{}",
        '{"digest": 3}',
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
        json.dumps({"digest": "", "files": []}),
    ):
        (tmp_path / "list.json").write_text(wrong)
        assert manifest.fault(tmp_path, "list.json") is not None
