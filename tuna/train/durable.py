"""Transformers' `Trainer` with atomic checkpoints, exact resuming on any number of ranks, and a checked DeepSpeed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from tuna.models.integrity import MARKER, CheckpointError
from tuna.system import manifest
from tuna.system.locks import hold
from tuna.train import checkpoints, deepspeed, resuming
from tuna.train.checkpoints import Shape
from tuna.train.finite import check_gradient
from tuna.train.stopping import Stopped, StopSignals
from tuna.train.trust import loading, reading

logger = logging.getLogger(__name__)
RESUMABLE = ("optimizer.pt", "optimizer.bin", "optimizer_*", "latest")


@dataclass(frozen=True)
class Start:
    """How a run starts.

    Attributes:
        run: name of the run.
        checkpoint: the checkpoint to resume from, if any.
        universal: whether it is loaded in DeepSpeed's universal format.
        changed: names of settings that differ from the checkpoint's.
    """

    run: str
    checkpoint: str | None = None
    universal: bool = False
    changed: frozenset[str] = frozenset()


class DurableTrainer(Trainer):
    """`transformers.Trainer` with the checkpoints of `tuna.train.checkpoints`, for any model and loss."""

    overwrite = False
    """Whether a new run removes the checkpoints of an earlier one in its folder."""

    _draft: Path | None = None
    _start = Start("")
    _settings: Mapping[str, Any] = {}
    _fresh_groups: list[dict[str, Any]] = []  # noqa: RUF012  # replaced, never changed

    @property
    def shape(self) -> Shape:
        """The shape that checkpoints of this run must fit."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        ranks = self.accelerator.num_processes
        return Shape(ranks, int(plugin.zero_stage) if plugin else 0, ranks * self.args.gradient_accumulation_steps)

    def settings(self) -> dict[str, Any]:
        """The settings saved in a checkpoint, see `tuna.train.resuming`."""
        return resuming.describe_arguments(self.args.to_dict())  # type: ignore[no-untyped-call]

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; `True` resumes from the last complete checkpoint, or starts without one.

        SIGTERM and SIGINT end the run after the current step, with a checkpoint (unless `save_strategy` is "no").

        Raises:
            CheckpointError: the checkpoint cannot be resumed.
            FloatingPointError: non-finite loss or gradient.
            FolderInUse: another process trains in the same folder.
            Stopped: a signal ended the run.
        """
        run = Path(str(self.args.output_dir))
        first = self.is_world_process_zero()
        if self.args.should_save:
            self._settings = self.settings()
        with hold(run) if first else nullcontext(), StopSignals() as self.stop:
            decided: list[Any] = [None, None]
            if first:  # one process decides for all
                try:
                    decided[0] = self._decide(run, resume_from_checkpoint)
                except CheckpointError as error:
                    decided[1] = str(error)
            decided = self._from_first(decided)
            if decided[1] is not None:
                raise CheckpointError(decided[1])
            self._start = decided[0]
            if self.is_deepspeed_enabled:
                config = self.accelerator.state.deepspeed_plugin.deepspeed_config
                config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": self._start.universal}
            return super().train(self._start.checkpoint, *args, **kwargs)

    def _decide(self, run: Path, wanted: str | bool | None) -> Start:
        """Choose where to start; converts a checkpoint to the universal format if needed."""
        checkpoints.remove_drafts(run)
        found = self._found(run, wanted)
        if found is None:
            return Start(checkpoints.begin_run(run, clear=self.overwrite and not wanted))
        if not (found / checkpoints.STATE).exists():
            raise CheckpointError(f"resume_from_checkpoint = {found} is not a checkpoint: no {checkpoints.STATE}")
        marked = (found / MARKER).exists()
        changed = self._compare(found) if marked else frozenset()
        if not marked:
            logger.warning("%s was not written by Tuna: its files and settings cannot be checked", found)
        if not any(list(found.glob(name)) for name in RESUMABLE):
            raise CheckpointError(
                f"{found} has a model but no optimizer (save_only_model) and cannot be resumed. Start a new run "
                f"with it as the model (--model {found}), in another folder"
            )
        universal = checkpoints.check_shape(found, self.shape)
        if universal:
            if deepspeed.on_nvme(self.accelerator.state.deepspeed_plugin.deepspeed_config):
                raise CheckpointError(
                    f"{found} was written by another number of ranks or under another ZeRO stage and cannot be "
                    "loaded into states on NVMe: resume with states in host memory (device: cpu)"
                )
            logger.warning("converting %s for another number of ranks or ZeRO stage", found)
            checkpoints.make_universal(found, trust=self._trust)
        same_folder = run.exists() and found.parent.samefile(run)
        name = checkpoints.go_on(run, run / found.name) if same_folder else checkpoints.begin_run(run)
        return Start(name, str(found), universal, changed)

    def _found(self, run: Path, wanted: str | bool | None) -> Path | None:
        """The requested checkpoint, verified."""
        if wanted is True:
            found, faults = checkpoints.newest(run)
            for fault in faults if found else ():
                logger.warning("%s; resuming from the one before, %s", fault, found)
            if found is None and faults:
                raise CheckpointError("\n".join([f"{run} has no checkpoint that can be resumed:", *faults]))
            if found is None:
                logger.warning("no complete checkpoint in %s: starting from the beginning", run)
            return found
        if not wanted:
            return None
        given = Path(wanted)
        if (given / MARKER).exists() and (wrong := checkpoints.fault(given)) is not None:
            raise CheckpointError(f"resume_from_checkpoint = {given}: {wrong}")
        return given

    def _compare(self, found: Path) -> frozenset[str]:
        """The settings that differ from the checkpoint's; raises if one of them must not differ."""
        marker = manifest.read(found, MARKER)
        differences = resuming.compare(marker.get("settings") or {}, self._settings)
        step, limit = int(marker["step"]), self.args.max_steps
        if 0 < limit < step:
            raise CheckpointError(
                f"max_steps = {limit}, but {found} is already at step {step}: raise max_steps, or start a new run "
                "in another folder"
            )
        allowed = getattr(self.args, "allow_changes", False)
        if differences.kind:
            lines = [f"{found} was written by a different kind of run:", *differences.kind]
            raise CheckpointError("\n  ".join(lines) + "\nUse those settings, or start a new run in another folder.")
        if differences.fixed and not allowed:
            lines = [f"{found} differs from this run:", *differences.fixed]
            raise CheckpointError(
                "\n  ".join(lines) + "\nUse those settings, start a new run in another folder, or give --allow-changes "
                "to resume anyway: groups may then occur twice in an epoch, or not at all."
            )
        if differences.fixed or differences.told:
            lines = [f"settings differ from those of {found}; the new ones apply from step {step + 1} on:"]
            logger.warning("\n  ".join([*lines, *differences.fixed, *differences.told]))
        ranks = checkpoints.Shape(**marker["shape"]).ranks
        if ranks != self.shape.ranks:
            logger.warning(
                "%s was written by %d ranks, this run has %d: random states are reset (this affects dropout only)",
                found,
                ranks,
                self.shape.ranks,
            )
        return differences.names

    def _from_first(self, value: list[Any]) -> list[Any]:
        """The first process's `value`, on all processes."""
        return value if self.accelerator.num_processes == 1 else list(broadcast_object_list(value))

    @property
    def _trust(self) -> bool:
        return bool(getattr(self.args, "trust_checkpoint", False))

    def _loading(self, checkpoint: str | None) -> AbstractContextManager[None]:
        if checkpoint is None:
            return nullcontext()
        return loading(Path(checkpoint), trust=self._trust, deepspeed=self.is_deepspeed_enabled)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        checkpoint = self._start.checkpoint
        with reading(Path(checkpoint)) if checkpoint else nullcontext():
            found = super()._init_training_state(max_steps, *args, **kwargs)
        if checkpoint:
            # This run decides how often to log, evaluate and save; the checkpoint's state has the old run's intervals.
            self.state.compute_steps(self.args, max_steps)  # type: ignore[no-untyped-call]
            best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir():  # if the folder was moved or copied, use its own, not that of the old location
                self.state.best_model_checkpoint = str(best)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._loading(resume_from_checkpoint), reading(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint)) if checkpoint else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._loading(checkpoint), reading(Path(checkpoint)) if checkpoint else nullcontext():
            super()._load_rng_state(checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `transformers.Trainer.create_scheduler`; called before a checkpoint is loaded."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        groups = getattr(self.optimizer, "param_groups", [])
        self._fresh_groups = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        return scheduler

    def _prepare_for_training(self, max_steps: int, loader: Any, checkpoint: str | None) -> Any:
        with self._loading(checkpoint):
            prepared = super()._prepare_for_training(max_steps, loader, checkpoint)  # type: ignore[no-untyped-call]
            if self.args.deepspeed:
                engine: Any = self.model_wrapped
                deepspeed.check_engine(engine, self.accelerator.num_processes)
                if checkpoint is not None and engine.load_universal_checkpoint():
                    deepspeed.mend_universal(engine, checkpoint)
        if checkpoint is not None and self._start.changed & set(resuming.SCHEDULE):
            scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
            resuming.apply_schedule(self.optimizer, scheduler, self._fresh_groups)
        return prepared

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        wrong = checkpoints.fault(best)
        if wrong is not None:
            raise CheckpointError(f"load_best_model_at_end: {wrong}; the last checkpoint can still be exported")
        with self._loading(str(best)), reading(best):
            super()._load_best_model()

    # Saving, and stopping early

    def _stop_agreed(self) -> bool:
        """Whether all ranks know that the run ends after this step."""
        return self.stop.received is not None and self.accelerator.num_processes == 1

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        stopping = self._stop_agreed()
        if stopping:
            self.control.should_log = True
            self.control.should_save = str(getattr(self.args.save_strategy, "value", "")) != "no"
            if (
                self.args.metric_for_best_model is None
            ):  # otherwise the resumed run would choose among other evaluations
                self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if stopping:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            target = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            kept = f"{target} is complete" if target.exists() else "save_strategy is 'no', so nothing was saved"
            raise Stopped(
                f"stopped by {self.stop.received or 'a signal to another rank'} after step "
                f"{self.state.global_step}; {kept}"
            )

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return folder if self._draft is None else str(self._draft)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        draft, target = run / checkpoints.DRAFT / name, run / name
        writes = self.args.should_save
        try:
            self._draft = draft.parent  # where transformers writes it
            super()._save_checkpoint(model, trial)
            self._draft = None
            if self.state.best_model_checkpoint == str(draft):
                self.state.best_model_checkpoint = str(target)
                if writes:
                    self.state.save_to_json(str(draft / checkpoints.STATE))
            self.accelerator.wait_for_everyone()
            if writes:
                checkpoints.publish(draft, target, self.shape, run=self._start.run, settings=self._settings)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError when the disk is full
            self._draft = None
            shutil.rmtree(draft.parent, ignore_errors=True)
            last = checkpoints.last_complete(run)
            kept = f"{last} is complete: resume from it with --resume" if last else "there is no earlier one"
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
        if not self.args.fp16 and norm is not None:  # with float16, loss scaling skips steps that overflow
            check_gradient(float(norm), self.state.global_step + 1)
        return norm
