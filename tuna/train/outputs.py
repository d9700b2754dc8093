"""Checks of output paths: a command never overwrites its inputs nor writes into a folder of other content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tuna.data.templates import SAVED
from tuna.models.integrity import MARKER
from tuna.train.checkpoints import RUN_FILE, STATE, numbered

__all__ = ["check_content", "check_files", "check_place", "holds_run", "is_in"]

# Files allowed in the folder of a new run: its settings and scripts, logs of schedulers and of `tuna recipe`.
HARMLESS = {".err", ".log", ".out", ".sh", ".yaml", ".yml"}
RECIPE_LOG = "log.txt"
# Files read from a model's folder and from a run's.
OF_MODEL = (
    "*config*.json", "*.safetensors*", "*.bin*", "*.model", "*.jinja", "*token*.json", "vocab.*", "merges.txt",
    MARKER, RUN_FILE, STATE, SAVED,
)  # fmt: skip


def check_place(output: Path, inputs: Mapping[str, Path]) -> None:
    """Check that `output` can be the folder of a run.

    Args:
        output: the folder; need not exist.
        inputs: files or folders that the run reads, by the name of their setting.

    Raises:
        ValueError: it is a file or the home folder, or contains or is inside an input.
    """
    if output.is_symlink() and not output.exists():
        raise ValueError(f"output_dir = {output} is a link to {os.readlink(output)}, which does not exist")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir = {output} is a file")
    real = Path(os.path.realpath(output))  # resolve() raises for a link to itself before Python 3.13
    if real == Path(os.path.realpath(Path.home())) or real == Path(real.anchor):
        raise ValueError(f"output_dir = {output} is {real}: give a separate folder for the run")
    if inside := next((at for at in (real, *real.parents) if (at / MARKER).exists()), None):
        raise ValueError(f"output_dir = {output} is inside the checkpoint {inside}: give a separate folder for the run")
    for name, path in inputs.items():
        if not path.exists():
            continue
        if is_in(path, output):
            raise ValueError(f"output_dir = {output} contains {name} = {path}: give a separate folder for the run")
        if path.is_dir() and is_in(output, path):
            raise ValueError(f"output_dir = {output} is inside {name} = {path}: give a separate folder for the run")


def check_content(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may be written into the existing content of `output`; the caller must hold the folder's lock.

    Args:
        output: the folder; need not exist.
        resume: whether to resume the run in it.
        overwrite: whether to overwrite it.

    Raises:
        ValueError: it contains something other than a run, or a run that is neither resumed nor overwritten.
    """
    if holds_run(output):
        if not resume and not overwrite:
            raise ValueError(
                f"output_dir = {output} already has a run: --resume continues it, --overwrite replaces it; or choose "
                "another folder"
            )
        return
    others = sorted(path.name for path in output.iterdir() if not _harmless(path)) if output.exists() else []
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"output_dir = {output} is not empty and has no run of tuna train ({', '.join(others[:3])}{more}): "
            "choose another folder"
        )


def check_files(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, str | Path | None], *, model: str | None = None
) -> None:
    """Check that the output files of a command are distinct and none of its inputs, also through links.

    Args:
        outputs: files by the name of their setting.
        inputs: files or folders by the name of their setting.
        model: the model read; results may be written to its folder, but not over the files of the model.

    Raises:
        ValueError: an output is an input or inside an input folder, or two outputs are the same file.
    """
    given = {name: output for name, output in outputs.items() if output is not None}
    seen: dict[Path, str] = {}
    for name, output in given.items():
        for other, path in inputs.items():
            if path not in (None, "") and is_in(output, Path(str(path)).expanduser()):
                raise ValueError(f"{name} = {output} would overwrite {other} = {path}: choose another path")
        if model is not None and is_in(output, Path(model).expanduser()) and _makes_model(output):
            raise ValueError(f"{name} = {output} would overwrite model = {model}: choose another name")
        twin = seen.setdefault(Path(os.path.realpath(output)), name)
        if twin != name:
            raise ValueError(f"{name} = {output} is the same file as {twin} = {given[twin]}: choose another name")


def holds_run(folder: Path) -> bool:
    """Whether `tuna train` has written to a folder."""
    if not folder.is_dir():
        return False
    return (folder / RUN_FILE).exists() or any((at / MARKER).exists() for at in numbered(folder))


def is_in(path: Path, place: Path) -> bool:
    """Whether `path` is the file or folder `place` or is inside it, with links resolved."""
    if not place.exists():
        return False
    real = Path(os.path.realpath(path))
    return any(at.exists() and at.samefile(place) for at in (real, *real.parents))


def _makes_model(path: Path) -> bool:
    return path.exists() and any(path.match(pattern) for pattern in OF_MODEL)


def _harmless(path: Path) -> bool:
    return path.name.startswith(".") or path.name in (RECIPE_LOG, SAVED) or path.suffix in HARMLESS
