"""The log of a run as JSON lines, in addition to the services in `report_to` (TensorBoard, Weights & Biases …)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuna.system.writing import finite, replacing

LOG_FILE = "log.jsonl"


def default_reports() -> list[str]:
    """TensorBoard if it is installed."""
    return ["tensorboard"] if find_spec("tensorboard") is not None else []


class JsonLines(TrainerCallback):
    """Appends every log entry, with its step and epoch, to a file; only the first process writes.

    A resumed run first drops the entries after its checkpoint, since those steps are run again. A `fresh` run starts
    a new file.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path, self.fresh = path, fresh

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step at which training resumes."""
        if not state.is_world_process_zero:
            return
        self._begin()
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= state.global_step]
        with replacing(self.path) as file:
            file.writelines(line + b"\n" for line in kept)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write one line."""
        if state.is_world_process_zero:
            self._begin()
            entry = {"step": state.global_step, "epoch": state.epoch, **(kwargs.get("logs") or {})}
            with self.path.open("ab") as file:
                file.write(json.dumps(finite(entry)).encode() + b"\n")

    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.fresh:
            self.path.unlink(missing_ok=True)
            self.fresh = False


def _lines(path: Path) -> list[bytes]:
    """The complete lines; one truncated by a kill is not JSON and is dropped."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        lines.append(line)
    return lines
