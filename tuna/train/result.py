"""What a training run leaves in its folder: a model that plain transformers loads, its metrics and a picture."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from tuna.data.templates import end_generation_at
from tuna.models.adapters import merged
from tuna.models.integrity import CheckpointError
from tuna.train.export import merged_from
from tuna.train.trainer import TunaTrainer

__all__ = ["ADAPTER_FOLDER", "METRICS_FILE", "PICTURE_FILE", "remove_result", "save_model"]

METRICS_FILE = "metrics.json"
PICTURE_FILE = "loss_curve.png"
ADAPTER_FOLDER = "adapter"
DRAFT = ".saving"


def save_model(trainer: TunaTrainer, output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A folder that plain transformers loads; an adapter is kept beside the model it was merged into.

    Raises:
        CheckpointError: it cannot be written.
    """
    draft, first = output / DRAFT, trainer.is_world_process_zero()
    if first:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    trainer.accelerator.wait_for_everyone()
    try:
        _write(trainer, draft, tokenizer)
        trainer.accelerator.wait_for_everyone()
        if first:
            _publish(draft, output)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{output / 'model.safetensors'} or what belongs to it could not be written ({error}); the last checkpoint "
            "is whole: the same command with --resume writes it again"
        ) from error


def _write(trainer: TunaTrainer, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if not hasattr(trainer.model, "merge_and_unload"):
        trainer.save_model(str(folder))
        return
    trainer.save_model(str(folder / ADAPTER_FOLDER))
    model = cast(Any, trainer.model)
    if trainer.shape.zero_stage == 3:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all ranks gather, the first gets it
        merge: Callable[[], Any] = functools.partial(merged_from, model, weights)
    else:
        merge = functools.partial(merged, model)
    if trainer.is_world_process_zero():
        whole = merge()
        end_generation_at(whole, tokenizer, trainer.args.template)
        whole.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def remove_result(output: Path) -> None:
    """Take away what an earlier run ended in; its checkpoints are the trainer's to remove."""
    for file in [*output.glob("model*.safetensors*"), output / METRICS_FILE, output / PICTURE_FILE]:
        if file.is_file():
            file.unlink()
    shutil.rmtree(output / ADAPTER_FOLDER, ignore_errors=True)


def _publish(draft: Path, output: Path) -> None:
    """Move the files of a draft to where they belong, and remove shards of an earlier model."""
    files = {file.relative_to(draft): file for file in draft.rglob("*") if file.is_file()}
    for place, file in files.items():
        (output / place).parent.mkdir(parents=True, exist_ok=True)
        file.replace(output / place)
    for old in output.glob("model*.safetensors*"):
        if old.relative_to(output) not in files:
            old.unlink()
    shutil.rmtree(draft)
