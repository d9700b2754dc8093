"""The stock trainer, made to survive: whole checkpoints, exact resume on any number of ranks, DeepSpeed for sure."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from tuna import checkpoints, zero
from tuna.checkpoints import CheckpointError, Shape
from tuna.guards import check_gradient

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"


class DurableTrainer(Trainer):
    """`transformers.Trainer` with checkpoints as in `tuna.checkpoints`; knows nothing of what is trained."""

    _draft: Path | None = None

    @property
    def shape(self) -> Shape:
        """What a checkpoint of this run has to fit."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        ranks = self.accelerator.num_processes
        return Shape(ranks, int(plugin.zero_stage) if plugin else 0, ranks * self.args.gradient_accumulation_steps)

    # Going on

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock trainer's; ``True`` goes on from the last complete checkpoint, or begins where there is none.

        Raises:
            CheckpointError: a checkpoint that this run cannot go on from.
            FloatingPointError: a loss or a gradient that is no number.
        """
        run = Path(str(self.args.output_dir))
        decided: list[Any] = [None, None]
        if self.is_world_process_zero():  # one looks, all do the same
            try:
                decided[0] = self._decide(run, resume_from_checkpoint)
            except CheckpointError as error:
                decided[1] = str(error)
        decided = self._from_first(decided)
        if decided[1] is not None:
            raise CheckpointError(decided[1])
        checkpoint, universal = decided[0]
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": universal}
        return super().train(checkpoint, *args, **kwargs)

    def _decide(self, run: Path, wanted: str | bool | None) -> tuple[str | None, bool]:
        """The checkpoint to go on from, and whether in its universal form (which is made here)."""
        checkpoints.remove_drafts(run)
        if wanted is True:
            found = checkpoints.last_complete(run)
            if found is None:
                logger.warning("no complete checkpoint in %s: starting from the beginning", run)
        else:
            found = Path(wanted) if wanted else None
        if found is None:
            return None, False
        if not (found / STATE).exists():
            raise CheckpointError(f"resume_from_checkpoint = {found} is no checkpoint: it holds no {STATE}")
        if (found / checkpoints.MARKER).exists() and not checkpoints.is_complete(found):
            raise CheckpointError(f"{found} has lost files that {checkpoints.MARKER} lists")
        universal = checkpoints.check_shape(found, self.shape)
        if universal:
            if zero.on_nvme(self.accelerator.state.deepspeed_plugin.deepspeed_config):
                raise CheckpointError(
                    f"{found} was written by another number of ranks or under another ZeRO stage, which cannot be "
                    "loaded into states on NVMe: go on with states in host memory (device: cpu)"
                )
            logger.warning("converting %s for another number of ranks or ZeRO stage", found)
            checkpoints.make_universal(found)
        return str(found), universal

    def _from_first(self, value: list[Any]) -> list[Any]:
        """``value`` of the first process, on all."""
        return value if self.accelerator.num_processes == 1 else list(broadcast_object_list(value))

    def _prepare_for_training(self, max_steps: int, loader: Any, checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, loader, checkpoint)  # type: ignore[no-untyped-call]
        if self.args.deepspeed:
            engine: Any = self.model_wrapped
            zero.check_engine(engine, self.accelerator.num_processes)
            if checkpoint is not None and engine.load_universal_checkpoint():
                zero.mend_universal(engine, checkpoint)
        return prepared

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return folder if self._draft is None else str(self._draft)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        draft, target = run / checkpoints.DRAFT / name, run / name
        writes = self.args.should_save
        try:
            self._draft = draft.parent  # where the stock trainer puts it
            super()._save_checkpoint(model, trial)
            self._draft = None
            if self.state.best_model_checkpoint == str(draft):
                self.state.best_model_checkpoint = str(target)
                if writes:
                    self.state.save_to_json(str(draft / STATE))
            self.accelerator.wait_for_everyone()
            if writes:
                checkpoints.publish(draft, target, self.shape)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError where the disk is full
            self._draft = None
            shutil.rmtree(draft.parent, ignore_errors=True)
            last = checkpoints.last_complete(run)
            kept = f"{last} is complete: go on from it with --resume" if last else "there is none before it"
            raise CheckpointError(f"{target} could not be written ({error}); {kept}") from error
        self.accelerator.wait_for_everyone()
        if writes:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if not self.args.fp16 and norm is not None:  # loss scaling lets float16 overflow and skips the step
            check_gradient(float(norm), self.state.global_step + 1)
        return norm
