"""Law: a command writes neither over what it reads nor into a folder that is somebody else's, by whatever name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tuna.train.test_cli_train import invoke
from tuna.train.checkpoints import begin_run
from tuna.train.outputs import check_content, check_files, check_place, is_in


def check_run_folder(output: Path, inputs: dict[str, Path], *, resume: bool, overwrite: bool) -> None:
    check_place(output, inputs)
    check_content(output, resume=resume, overwrite=overwrite)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model, data, notes and a run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "data", "notes", "run", "empty", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    (tmp_path / "notes" / "thesis.tex").write_text("x")
    (tmp_path / "logs" / "slurm-1.out").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    begin_run(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2").mkdir()
    (tmp_path / "run" / "checkpoint-2" / "complete.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("model", "contains model|is inside model"),
        ("link", "contains model|is inside model"),
        ("model/run", "is inside model"),
        ("link/new/deeper", "is inside model"),
        ("data", "contains data"),
        ("data/../data", "contains data"),
        ("", "contains|give a separate folder for the run"),
        ("notes", r"not empty and has no run of tuna train \(thesis.tex\)"),
        ("nowhere", "a link to .*gone, which does not exist"),
        ("data/a.jsonl", "is a file"),
        ("loop", "a link to .*loop, which does not exist"),
        ("run/checkpoint-2/more", "is inside the checkpoint .*/run/checkpoint-2"),
    ],
)
def test_refused(place: Path, output: str, told: str, overwrite: bool) -> None:
    inputs = {"model": place / "model", "data": place / "data" / "a.jsonl"}
    with pytest.raises(ValueError, match=told):
        check_run_folder(place / output, inputs, resume=False, overwrite=overwrite)


def test_allowed(place: Path) -> None:
    inputs = {"model": place / "model", "data": place / "data" / "a.jsonl"}
    for output in ("empty", "new", "data/run", "logs"):
        check_run_folder(place / output, inputs, resume=False, overwrite=False)
    with pytest.raises(ValueError, match=r"already has a run: --resume continues it, --overwrite replaces it"):
        check_run_folder(place / "run", inputs, resume=False, overwrite=False)
    check_run_folder(place / "run", inputs, resume=True, overwrite=False)
    check_run_folder(place / "run", inputs, resume=False, overwrite=True)
    with pytest.raises(ValueError, match="is inside data"):  # a folder saved by datasets
        check_run_folder(place / "data" / "run", {"data": place / "data"}, resume=False, overwrite=False)


def test_a_file_is_itself_by_every_name(place: Path) -> None:
    data = place / "data" / "a.jsonl"
    (place / "hard.jsonl").hardlink_to(data)
    (place / "soft.jsonl").symlink_to(data)
    for name in ("data/a.jsonl", "data/../data/a.jsonl", "hard.jsonl", "soft.jsonl"):
        with pytest.raises(ValueError, match=r"target = .* would overwrite source"):
            check_files({"target": place / name}, {"source": str(data)})
    check_files({"target": place / "loop"}, {"source": str(data), "like": ""})
    check_files({"target": place / "b.jsonl", "other": None}, {"source": str(data), "like": None})
    assert is_in(data, place / "data") and not is_in(place / "notes", place / "data")


def test_figures_do_not_take_the_place_of_a_model_or_of_each_other(place: Path) -> None:
    model = str(place / "link")
    check_files({"json": place / "model" / "score.json", "picture": place / "model" / "model.png"}, {}, model=model)
    (place / "model" / "config.json").write_text("{}")
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(ValueError, match=r"json = .* would overwrite model = "):
            check_files({"json": place / "model" / name}, {}, model=model)
    with pytest.raises(ValueError, match=r"per_record = .* is the same file as json = "):
        check_files({"json": place / "a.jsonl", "per_record": place / "data" / ".." / "a.jsonl"}, {})


def test_converting_a_file_onto_itself_is_refused(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "p", "chosen": "x", "rejected": "y"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    done = invoke("data", "convert", str(path), str(path))
    assert done.exit_code != 0 and json.loads(path.read_text()) == row
