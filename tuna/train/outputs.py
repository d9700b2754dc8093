"""Where a command may write: never over what it reads, and never into a folder that is somebody else's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tuna.data.templates import SAVED
from tuna.models.integrity import MARKER
from tuna.train.checkpoints import RUN_FILE, STATE, numbered

__all__ = ["check_content", "check_files", "check_place", "holds_run", "is_in"]

# What may lie in a new run's folder: its own settings and scripts, logs of schedulers and of `tuna recipe`.
HARMLESS = {".err", ".log", ".out", ".sh", ".yaml", ".yml"}
RECIPE_LOG = "log.txt"
# What is read of a model's folder, and of a run's.
OF_MODEL = (
    "*config*.json", "*.safetensors*", "*.bin*", "*.model", "*.jinja", "*token*.json", "vocab.*", "merges.txt",
    MARKER, RUN_FILE, STATE, SAVED,
)  # fmt: skip


def check_place(output: Path, inputs: Mapping[str, Path]) -> None:
    """Hold that a run's folder may be where `output` says.

    Args:
        output: the folder; need not exist.
        inputs: what the run reads, by the name of its setting; files or folders.

    Raises:
        ValueError: it is a file, the home folder, or holds or lies in something that the run reads.
    """
    if output.is_symlink() and not output.exists():
        raise ValueError(f"output_dir = {output} is a link to {os.readlink(output)}, which does not exist")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir = {output} is a file")
    real = Path(os.path.realpath(output))  # resolve() of a link to itself is an error before Python 3.13
    if real == Path(os.path.realpath(Path.home())) or real == Path(real.anchor):
        raise ValueError(f"output_dir = {output} is {real}: give a folder of the run's own")
    if inside := next((at for at in (real, *real.parents) if (at / MARKER).exists()), None):
        raise ValueError(f"output_dir = {output} lies in the checkpoint {inside}: give a folder of the run's own")
    for name, path in inputs.items():
        if not path.exists():
            continue
        if is_in(path, output):
            raise ValueError(f"output_dir = {output} holds {name} = {path}: give a folder of the run's own")
        if path.is_dir() and is_in(output, path):
            raise ValueError(f"output_dir = {output} lies in {name} = {path}: give a folder of the run's own")


def check_content(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Hold that a run may be written into the folder `output`, as it is; to be asked by who holds it.

    Args:
        output: the folder; need not exist.
        resume: whether to go on with the run that is there.
        overwrite: whether to write over it.

    Raises:
        ValueError: it holds something that is no run, or a run that is neither to be gone on with nor written over.
    """
    if holds_run(output):
        if not resume and not overwrite:
            raise ValueError(
                f"output_dir = {output} holds a run already: --resume goes on with it, --overwrite begins again in "
                "its place; or choose another folder"
            )
        return
    others = sorted(path.name for path in output.iterdir() if not _harmless(path)) if output.exists() else []
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"output_dir = {output} is not empty and holds no run of tuna train ({', '.join(others[:3])}{more}): "
            "choose another folder"
        )


def check_files(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, str | Path | None], *, model: str | None = None
) -> None:
    """Hold that the files a command writes are none of those it reads, and not one twice, whatever they are called by.

    Args:
        outputs: files by the name of their setting.
        inputs: files or folders by the name of theirs.
        model: what is read besides; figures may lie in its folder, but not in place of what makes it.

    Raises:
        ValueError: one is, or lies in a folder that is read.
    """
    given = {name: output for name, output in outputs.items() if output is not None}
    seen: dict[Path, str] = {}
    for name, output in given.items():
        for other, path in inputs.items():
            if path not in (None, "") and is_in(output, Path(str(path)).expanduser()):
                raise ValueError(f"{name} = {output} would write over {other} = {path}: choose another place")
        if model is not None and is_in(output, Path(model).expanduser()) and _makes_model(output):
            raise ValueError(f"{name} = {output} would write over model = {model}: choose another name")
        twin = seen.setdefault(Path(os.path.realpath(output)), name)
        if twin != name:
            raise ValueError(f"{name} = {output} is {twin} = {given[twin]} too: choose another name")


def holds_run(folder: Path) -> bool:
    """Whether `tuna train` has written to a folder."""
    if not folder.is_dir():
        return False
    return (folder / RUN_FILE).exists() or any((at / MARKER).exists() for at in numbered(folder))


def is_in(path: Path, place: Path) -> bool:
    """Whether `path` is the file or folder `place` or lies in it, by whatever links or names."""
    if not place.exists():
        return False
    real = Path(os.path.realpath(path))
    return any(at.exists() and at.samefile(place) for at in (real, *real.parents))


def _makes_model(path: Path) -> bool:
    return path.exists() and any(path.match(pattern) for pattern in OF_MODEL)


def _harmless(path: Path) -> bool:
    return path.name.startswith(".") or path.name in (RECIPE_LOG, SAVED) or path.suffix in HARMLESS
