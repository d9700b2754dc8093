"""Checkpoints that are whole or not there, and going on from them on another number of ranks.

A checkpoint is written into a draft folder by the stock trainer (and DeepSpeed), on all ranks; when all are done,
the list of its files and their sizes is written beside them (`MARKER`), everything is flushed to the disk, and
the folder gets its name by a rename. So a process killed at any moment leaves the checkpoints before it and a
draft, which the next start removes, and a full disk leaves the same. `last_complete` reads the marker, so a
folder that lost files afterwards is passed over too.

Optimizer states under ZeRO are cut by the number of ranks. DeepSpeed's universal format is not;
`make_universal` converts a checkpoint to it, in the checkpoint's own folder, once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tuna.files import replacing

logger = logging.getLogger(__name__)

MARKER = "complete.json"
DRAFT = ".writing"
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Shape:
    """What a run must have in common with the checkpoint it goes on from.

    Attributes:
        ranks: processes that wrote it; may change.
        zero_stage: ZeRO stage, 0 without DeepSpeed.
        batches_a_step: micro-batches of an optimizer step over all ranks: what the place in the data counts by.
    """

    ranks: int
    zero_stage: int
    batches_a_step: int


class CheckpointError(OSError):
    """A checkpoint could not be written or cannot be gone on from."""


def publish(draft: Path, target: Path, shape: Shape) -> None:
    """Give a finished draft its name; one process does it, after all have written.

    Raises:
        OSError: the disk is full; the draft has no marker and no name then.
    """
    files = {str(file.relative_to(draft)): file.stat().st_size for file in _files(draft)}
    for name in files:
        _flush(draft / name)
    content = {"shape": asdict(shape), "files": files}
    with replacing(draft / MARKER) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    _flush(draft / MARKER)
    for folder in {draft, *(file.parent for file in _files(draft))}:
        _flush(folder)
    if target.exists():  # written before, by a run that went on from an earlier step
        target.rename(draft.with_name("replaced"))
    draft.rename(target)
    _flush(target.parent)
    shutil.rmtree(draft.with_name("replaced"), ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether every file that the marker lists is there in its size."""
    try:
        files = json.loads((folder / MARKER).read_text("utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def last_complete(run: Path) -> Path | None:
    """The complete checkpoint of the highest step in the folder of a run, if there is one."""
    found = {int(match[1]): folder for folder in run.glob("checkpoint-*") if (match := NAME.fullmatch(folder.name))}
    for step in sorted(found, reverse=True):
        if is_complete(found[step]):
            return found[step]
        logger.warning("%s is not complete: passed over", found[step])
    return None


def remove_drafts(run: Path) -> None:
    """Remove what a killed run was writing; a replaced checkpoint whose successor got no name comes back."""
    drafts = run / DRAFT
    replaced = drafts / "replaced"
    if is_complete(replaced):
        step = json.loads((replaced / "trainer_state.json").read_text("utf-8"))["global_step"]
        if not (run / f"checkpoint-{step}").exists():
            replaced.rename(run / f"checkpoint-{step}")
    shutil.rmtree(drafts, ignore_errors=True)


def shape_of(checkpoint: Path) -> Shape | None:
    """The shape a checkpoint was written with, None where it was not written by us."""
    try:
        return Shape(**json.loads((checkpoint / MARKER).read_text("utf-8"))["shape"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_shape(checkpoint: Path, now: Shape) -> bool:
    """Whether ``checkpoint`` has to be converted for ``now``.

    Raises:
        CheckpointError: an optimizer step would have another number of micro-batches, or optimizer states of
            another kind are needed.
    """
    then = shape_of(checkpoint)
    if then is None:
        return False
    if then.batches_a_step != now.batches_a_step:
        raise CheckpointError(
            f"{checkpoint} was written with {then.batches_a_step} micro-batches a step ({then.ranks} ranks x "
            f"{then.batches_a_step // then.ranks}), this run has {now.batches_a_step} ({now.ranks} ranks x "
            f"{now.batches_a_step // now.ranks}): choose gradient_accumulation_steps so that the product stays"
        )
    kinds = [
        ("without DeepSpeed", "under ZeRO-1 or 2", "under ZeRO-1 or 2", "under ZeRO-3")[s.zero_stage]
        for s in (then, now)
    ]
    if kinds[0] != kinds[1]:
        raise CheckpointError(f"{checkpoint} was written {kinds[0]}, this run is {kinds[1]}: use `tuna export` first")
    return now.zero_stage > 0 and (then.ranks, then.zero_stage) != (now.ranks, now.zero_stage)


def make_universal(checkpoint: Path) -> None:
    """Convert the optimizer states of a DeepSpeed checkpoint so that any number of ranks and any stage loads them.

    One process does it, in a process of its own (DeepSpeed's converter starts workers); a second call does
    nothing. Takes the disk space of the states once more.

    Raises:
        CheckpointError: the converter failed; with the end of its output.
    """
    if (checkpoint / "latest_universal").exists():
        return
    tag = (checkpoint / "latest").read_text("utf-8").strip()
    target = checkpoint / f"{tag}_universal"
    shutil.rmtree(target, ignore_errors=True)  # of a conversion that was killed
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    folders = ("--input_folder", str(checkpoint / tag), "--output_folder", str(target), "--inject_missing_state")
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders],
        env={name: value for name, value in os.environ.items() if name not in launcher},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CheckpointError(f"{checkpoint} cannot be converted for another number of ranks:\n{done.stdout[-2000:]}")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
