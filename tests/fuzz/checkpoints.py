"""Random damage to a run's folder: resume ends in the weights of the undamaged run, or in an error naming the file."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from safetensors.torch import load_file

from tests.tuna import launching

SHORT_RUN = 2  # cases; each trains
STEPS, EVERY = 6, 2
EXAMPLES = Path(__file__).resolve().parents[2] / "tuna" / "data" / "examples" / "ranked_demo.jsonl"
KINDS = ("plain", "lora", "best", "zero")
Damage: TypeAlias = Callable[[random.Random, Path, list[Path]], list[Path]]


def case(seed: int) -> None:
    """Damage a copy of a run that was ended early or is done, resume it, and look at the end.

    Raises:
        AssertionError: a traceback, weights that differ in silence, or an error that names nothing that was touched.
    """
    draw = random.Random(seed)
    kind = draw.choices(KINDS, (12, 6, 3, 1))[0]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        run = Path(folder, "run")
        shutil.copytree(made(kind), run)
        if draw.random() < 0.7:
            end_early(run)
        touched, told = [], []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            files = sorted(path for path in run.rglob("*") if path.is_file())
            if not files:
                break
            damage = draw.choice(DAMAGES)
            paths = damage(draw, run, files)
            touched += paths
            told.append(f"{damage.__name__}({', '.join(str(path.relative_to(run)) for path in paths)})")
        code, text = train(kind, run, "--resume")
        what = f"{kind}, {'; '.join(told)}: exit code {code}"
        assert "Traceback" not in text, f"{what}, a traceback:\n{text[-3000:]}"
        if code == 0:
            assert same_weights(run, made(kind)), f"{what}, and the weights differ from those of the undamaged run"
            return
        assert code == 2, f"{what}:\n{text[-2000:]}"
        names = {name for path in touched for name in path.relative_to(run).parts}
        assert any(name in text for name in names), f"{what}; the error names none of {sorted(names)}:\n{text[-2000:]}"


def words(kind: str, run: Path) -> list[str]:
    """The command line of a run of this kind."""
    found = f"train --model tiny --data {EXAMPLES} --limit 12 --max-length 64 --lr 1e-3 --output {run}".split()
    found += f"--steps {STEPS} --save-steps {EVERY} --logging-steps 1".split()
    if kind == "lora":
        found += ["--lora-r", "2", "--lora-targets", "q_proj,v_proj"]
    if kind == "best":
        found += ["--eval-fraction", "0.3", "--eval-steps", str(EVERY), "--set", "metric_for_best_model=loss/rank"]
        found += ["--set", "load_best_model_at_end=true", "--set", "save_total_limit=2"]
    if kind == "zero":
        found += ["--deepspeed", str(base() / "zero.json")]
    return found


def train(kind: str, run: Path, *more: str) -> tuple[int, str]:
    """Exit code and output of the run, in this process (under ZeRO in one of its own)."""
    command = [*words(kind, run), *more]
    if kind == "zero":
        return launching.finish(launching.start(0, "tuna", *command, cwd=base()), timeout=300)
    from tuna.cli import main

    text = io.StringIO()
    handler = logging.StreamHandler(text)  # whatever a test runner has made of logging
    logging.getLogger("tuna").addHandler(handler)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            main(command)
    except SystemExit as end:
        return int(end.code or 0), text.getvalue()
    except BaseException:
        return 1, text.getvalue() + traceback.format_exc()
    finally:
        logging.getLogger("tuna").removeHandler(handler)
    return 0, text.getvalue()


@functools.cache
def base() -> Path:
    """A folder of this process for the undamaged runs."""
    folder = tempfile.TemporaryDirectory(prefix="fuzz-runs-")
    _kept.append(folder)
    settings = {"zero_optimization": {"stage": 1}, "gradient_clipping": "auto"}
    Path(folder.name, "zero.json").write_text(json.dumps(settings))
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def made(kind: str) -> Path:
    """The undamaged run of a kind."""
    code, text = train(kind, base() / kind)
    assert code == 0, text[-3000:]
    return base() / kind


def end_early(run: Path) -> None:
    """Leave what a run leaves that was killed before its last checkpoint."""
    for path in run.iterdir():
        if path.is_dir() and path.name in (f"checkpoint-{STEPS}", "adapter"):
            shutil.rmtree(path)
        elif path.is_file() and path.name not in ("run.json", "log.jsonl"):
            path.unlink()


def same_weights(run: Path, other: Path) -> bool:
    """Whether two runs ended in the same bits."""
    found, expected = (load_file(folder / "model.safetensors") for folder in (run, other))
    return found.keys() == expected.keys() and all(found[name].equal(value) for name, value in expected.items())


# Each takes the files of the run and returns the paths that it touched.


def flip(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    start = draw.randrange(max(1, len(content)))
    for place in range(start, min(len(content), start + draw.choice((1, 1, 8, 64)))):
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return [path]


def cut(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    path = draw.choice(files)
    os.truncate(path, draw.choice((0, path.stat().st_size // 2, max(0, path.stat().st_size - 1))))
    return [path]


def grow(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    path = draw.choice(files)
    with path.open("ab") as file:
        file.write(draw.choice((b"\0", b"\n", b"}", b"x" * 4096)))
    return [path]


def remove(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    path = draw.choice(files)
    path.unlink()
    return [path]


def rename(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    path = draw.choice(files)
    target = path.with_name(draw.choice((f"{path.name}.bak", f"old_{path.name}", draw.choice(files).name)))
    path.replace(target)
    return [path, target]


def swap(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    one = draw.choice(files)
    alike = [path for path in files if path.name == one.name and path != one]
    other = draw.choice(alike or files)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    return [one, other]


def copy_over(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    one = draw.choice(files)
    alike = [path for path in files if path.name == one.name and path != one]
    other = draw.choice(alike or files)
    other.write_bytes(one.read_bytes())
    return [other]


def add(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    one = draw.choice(files)
    names = ("pytorch_model.bin", "adapter_model.safetensors", "optimizer.bin", "latest", "scaler.pt", "notes.txt")
    target = draw.choice(files).with_name(draw.choice(names))
    target.write_bytes(one.read_bytes())
    return [target]


def other_json(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    path = draw.choice([path for path in files if path.suffix in (".json", ".jsonl")] or files)
    path.write_text(draw.choice(("{}", "[]", "null", "3", '{"run": 7}', '{"files": {}}', "{", "", '"\\ud800"')))
    return [path]


def folder_for_file(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    path = draw.choice(files)
    path.unlink()
    path.mkdir()
    return [path]


def checkpoints_of(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"))


def remove_folder(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    path = draw.choice(checkpoints_of(run) or [run / "adapter"])
    shutil.rmtree(path, ignore_errors=True)
    return [path]


def rename_folder(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    found = checkpoints_of(run)
    if not found:
        return remove(draw, run, files)
    path = draw.choice(found)
    target = path.with_name(f"checkpoint-{draw.choice((1, 5, 8, 100))}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
    return [path, target]


def copy_folder(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    found = checkpoints_of(run)
    if not found:
        return remove(draw, run, files)
    path = draw.choice(found)
    target = draw.choice(
        [
            path.with_name(f"checkpoint-{draw.choice((1, 5, 8))}"),
            run / ".writing" / path.name,
            run / ".writing/replaced",
        ]
    )
    shutil.copytree(path, target, dirs_exist_ok=True)
    return [target]


def swap_folders(draw: random.Random, run: Path, files: list[Path]) -> list[Path]:
    found = checkpoints_of(run)
    if len(found) < 2:
        return remove(draw, run, files)
    one, other = draw.sample(found, 2)
    one.rename(run / "between")
    other.rename(one)
    (run / "between").rename(other)
    return [one, other]


DAMAGES: tuple[Damage, ...] = (
    flip, flip, flip, cut, cut, grow, remove, rename, swap, copy_over, add, other_json, folder_for_file, remove_folder,
    rename_folder, copy_folder, swap_folders,
)  # fmt: skip
