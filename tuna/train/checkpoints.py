"""Checkpoints that are written atomically, belong to one run, and can be resumed on another number of ranks.

All ranks write a checkpoint to a draft folder, through transformers' `Trainer` (and DeepSpeed); then the list of its
files with sizes and digests is added (`MARKER`), everything is flushed to disk, and the folder is renamed to its final
name. A process killed at any moment, or a full disk, leaves the earlier checkpoints and a draft, which the next start
removes. The marker also names the run, the step and the settings. `last_complete` checks all of this and skips a
folder with a missing, changed or replaced file, or of another run.

The name of a run is in `RUN_FILE` in its folder, written when the run begins.

Optimizer states under ZeRO are sharded by the number of ranks; DeepSpeed's universal format does not depend on it.
`make_universal` converts a checkpoint to it once, in the checkpoint's folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuna.models.integrity import LATEST_UNIVERSAL, MARKER, UNIVERSAL, CheckpointError, is_universal
from tuna.system import lifeline, manifest
from tuna.system.writing import sync, write_json

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
STATE = "trainer_state.json"
DRAFT = ".writing"
SET_ASIDE = "set-aside"
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Shape:
    """Properties of a run that decide whether it can resume from a checkpoint.

    Attributes:
        ranks: number of processes; may change.
        zero_stage: ZeRO stage, 0 without DeepSpeed.
        batches_a_step: micro-batches per optimizer step over all ranks, the unit of the position in the data.
    """

    ranks: int
    zero_stage: int
    batches_a_step: int


def publish(
    draft: Path, target: Path, shape: Shape, *, run: str | None = None, settings: Mapping[str, Any] | None = None
) -> None:
    """Complete a draft and rename it; called by one process after all have written.

    Args:
        draft: the folder of the files.
        target: the final folder, whose name ends in the step.
        shape: of the run.
        run: name of the run.
        settings: the settings so far, as compared by `tuna.train.resuming`.

    Raises:
        OSError: for example a full disk; the draft is then neither complete nor renamed.
    """
    files = manifest.files_in(draft)
    for file in files:
        sync(file)
    step = int(target.name.rpartition("-")[2])
    content = {"step": step, "run": run, "shape": asdict(shape), "settings": dict(settings or {})}
    manifest.write(draft, MARKER, content, files)
    sync(draft / MARKER)
    for folder in {draft, *(file.parent for file in files)}:
        sync(folder)
    if target.exists():  # written before the run was resumed from an earlier step
        target.rename(draft.with_name("replaced"))
    draft.rename(target)
    sync(target.parent)
    shutil.rmtree(draft.with_name("replaced"), ignore_errors=True)
    with suppress(OSError):
        draft.parent.rmdir()


def fault(folder: Path) -> str | None:
    """The first fault found in a checkpoint, naming the file; None if it is intact."""
    found = manifest.fault(folder, MARKER, apart=is_universal)
    if found is not None:
        return found
    marker = manifest.read(folder, MARKER)
    name = NAME.fullmatch(folder.name)
    if name and int(name[1]) != marker.get("step"):
        return f"{folder} is the checkpoint of step {marker.get('step')}: it was renamed"
    return None


def numbered(run: Path) -> list[Path]:
    """The checkpoint folders of a run by name, last step first."""
    found = {int(match[1]): folder for folder in run.glob("checkpoint-*") if (match := NAME.fullmatch(folder.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The last complete checkpoint of this run, and the faults of later ones.

    Raises:
        CheckpointError: as `run_name`.
    """
    name, faults = run_name(run), []
    for folder in numbered(run):
        wrong = fault(folder)
        if wrong is not None:
            faults.append(wrong)
        elif name in (None, _named(folder)):
            return folder, faults
        else:
            logger.warning("%s belongs to another run than %s: skipped", folder, run / RUN_FILE)
    return None, faults


def last_complete(run: Path) -> Path | None:
    """As `newest`; the faults of later checkpoints are logged."""
    found, faults = newest(run)
    for wrong in faults:
        logger.warning("%s; that checkpoint is skipped", wrong)
    return found


def run_name(run: Path) -> str | None:
    """The name of the run in a folder, None if there is none.

    Raises:
        CheckpointError: `RUN_FILE` is damaged, or it is missing and there are checkpoints of several runs.
    """
    path = run / RUN_FILE
    if path.exists():
        try:
            name = json.loads(path.read_text("utf-8"))["run"]
        except (OSError, ValueError, KeyError, TypeError):
            name = None
        if not isinstance(name, str) or not name:
            raise CheckpointError(
                f"{path} is damaged: it names no run. Remove it if all checkpoints in the folder belong to one run"
            )
        return name
    names = {name for folder in numbered(run) if (name := _named(folder)) is not None}
    if len(names) > 1:
        raise CheckpointError(
            f"{path} is missing and the checkpoints in the folder belong to {len(names)} runs: remove those not wanted"
        )
    return names.pop() if names else None


def begin_run(run: Path, *, clear: bool = False) -> str:
    """Start a new run in a folder under a new name, so that checkpoints of earlier runs are never used.

    Args:
        run: the folder.
        clear: remove the checkpoints of earlier runs; otherwise they are moved to `SET_ASIDE`.
    """
    name = uuid.uuid4().hex
    write_json(run / RUN_FILE, {"run": name})
    for folder in numbered(run):
        set_aside(folder, tell=not clear)
    if clear:  # moved first: a kill from here on leaves nothing that looks like a damaged checkpoint
        shutil.rmtree(run / SET_ASIDE, ignore_errors=True)
    return name


def go_on(run: Path, checkpoint: Path) -> str:
    """The name of the run that is resumed from `checkpoint` in its folder `run`.

    Checkpoints of other runs and of later steps, which are no longer valid, are moved to `SET_ASIDE`.
    """
    name = run_name(run) or _named(checkpoint) or uuid.uuid4().hex
    if not (run / RUN_FILE).exists():
        write_json(run / RUN_FILE, {"run": name})
    for folder in numbered(run):
        if folder == checkpoint:
            break  # earlier ones stay
        set_aside(folder)
    return name


def set_aside(folder: Path, *, tell: bool = True) -> None:
    """Move a checkpoint that must not be used into the folder `SET_ASIDE` of its run."""
    target = folder.parent / SET_ASIDE / folder.name
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{folder.name}.{number}")
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    if tell:
        logger.warning("%s is not used and was moved to %s", folder, target)


def remove_drafts(run: Path) -> None:
    """Remove the drafts of a killed run; a checkpoint that was about to be replaced is restored."""
    drafts = run / DRAFT
    replaced = drafts / "replaced"
    if replaced.is_dir() and fault(replaced) is None:
        target = run / f"checkpoint-{manifest.read(replaced, MARKER)['step']}"
        if not target.exists():
            replaced.rename(target)
    shutil.rmtree(drafts, ignore_errors=True)


def shape_of(checkpoint: Path) -> Shape | None:
    """The shape a checkpoint was written with, None if it was not written by Tuna."""
    try:
        return Shape(**manifest.read(checkpoint, MARKER)["shape"])
    except (ValueError, KeyError, TypeError):
        return None


def check_shape(checkpoint: Path, now: Shape) -> bool:
    """Whether `checkpoint` must be converted for a run of shape `now`.

    Raises:
        CheckpointError: the number of micro-batches per optimizer step differs, or optimizer states of another kind
            are needed.
    """
    then = shape_of(checkpoint)
    if then is None:
        return False
    if then.batches_a_step != now.batches_a_step:
        raise CheckpointError(
            f"{checkpoint} was written with {then.batches_a_step} micro-batches per step ({then.ranks} ranks x "
            f"{then.batches_a_step // then.ranks}), this run has {now.batches_a_step} ({now.ranks} ranks x "
            f"{now.batches_a_step // now.ranks}): choose gradient_accumulation_steps so that the product is the same"
        )
    kinds = [
        ("without DeepSpeed", "under ZeRO-1 or 2", "under ZeRO-1 or 2", "under ZeRO-3")[s.zero_stage]
        for s in (then, now)
    ]
    if kinds[0] != kinds[1]:
        raise CheckpointError(f"{checkpoint} was written {kinds[0]}, this run is {kinds[1]}: use `tuna export` first")
    return now.zero_stage > 0 and (then.ranks, then.zero_stage) != (now.ranks, now.zero_stage)


def make_universal(checkpoint: Path, *, trust: bool = False) -> None:
    """Convert the optimizer states of a DeepSpeed checkpoint for loading on any number of ranks and any ZeRO stage.

    Called by one process; runs in a subprocess (DeepSpeed's converter starts workers). A second call does nothing
    unless the result has been damaged since. Doubles the disk space of the states.

    Args:
        checkpoint: the checkpoint.
        trust: whether code in it may run, see `tuna.train.trust`.

    Raises:
        CheckpointError: the converter failed; the message has the end of its output.
    """
    if manifest.fault(checkpoint, UNIVERSAL, apart=lambda place: not is_universal(place)) is None:
        return
    tag = (checkpoint / "latest").read_text("utf-8").strip()
    target = checkpoint / f"{tag}_universal"
    shutil.rmtree(target, ignore_errors=True)  # left by a killed conversion
    for name in (UNIVERSAL, LATEST_UNIVERSAL):
        (checkpoint / name).unlink(missing_ok=True)
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    folders = ("--input_folder", str(checkpoint / tag), "--output_folder", str(target), "--inject_missing_state")
    with lifeline.start(
        [sys.executable, "-m", "tuna.train.universal", *(["--trust"] if trust else []), *folders],
        env={name: value for name, value in os.environ.items() if name not in launcher},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        output, _ = process.communicate()
    if process.returncode != 0:
        raise CheckpointError(f"{checkpoint} cannot be converted for another number of ranks:\n{output[-2000:]}")
    files = [file for file in manifest.files_in(checkpoint) if is_universal(file.relative_to(checkpoint).as_posix())]
    manifest.write(checkpoint, UNIVERSAL, {}, files)


def _named(folder: Path) -> str | None:
    """The name of a checkpoint's run."""
    try:
        name = manifest.read(folder, MARKER).get("run")
    except ValueError:
        return None
    return name if isinstance(name, str) else None
