"""Progress of training on a terminal: bars, and one short line a log entry."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuna.console.bar import progress_bar

# What a line shows, in order; everything else is in the trainer's log.
SHOWN = {
    "loss": ("loss", ".4f"),
    "loss/rank": ("rank", ".4f"),
    "loss/mle": ("mle", ".4f"),
    "rank/accuracy": ("accuracy", ".3f"),
    "rank/top1": ("top-1", ".3f"),
    "margin/mean": ("gap", "+.4f"),
    "active_share": ("active", ".2f"),
    "tokens/s": ("tokens/s", ",.0f"),
}


def log_line(logs: dict[str, float]) -> str:
    """`"step  loss 4.5940  rank 0.4319 …"` of a training or an evaluation entry, "" of any other."""
    prefix = next((name.removesuffix("loss") for name in logs if name == "loss" or name.endswith("_loss")), None)
    if prefix is None or "train_loss" in logs:
        return ""
    values = {name: logs[prefix + name] for name in SHOWN if prefix + name in logs}
    shown = [f"{SHOWN[name][0]} {value:{SHOWN[name][1]}}" for name, value in values.items()]
    return "  ".join([prefix.rstrip("_") or "step", *shown])


class TrainingProgress(TrainerCallback):
    """The stock trainer's bars and log lines, on `console`; silent on all but the first process."""

    def __init__(self, console: Console) -> None:
        self.bar = progress_bar(console, "steps")
        self.training: TaskID | None = None
        self.evaluation: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self.bar.start()
            self.training = self.bar.add_task("train", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step on."""
        if self.training is not None:
            self.bar.update(self.training, completed=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance by one evaluation batch."""
        if not state.is_world_process_zero:
            return
        if self.evaluation is None:
            self.bar.start()
            self.evaluation = self.bar.add_task("evaluate", total=len(kwargs["eval_dataloader"]))
        self.bar.advance(self.evaluation)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the evaluation bar away."""
        if self.evaluation is not None:
            self.bar.remove_task(self.evaluation)
            self.evaluation = None
        if self.training is None:
            self.bar.stop()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the line of a log entry."""
        line = log_line(kwargs.get("logs") or {})
        if state.is_world_process_zero and line:
            self.bar.console.print(f"{state.global_step:>6} {line}", highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()
        if self.training is not None:
            self.bar.remove_task(self.training)
            self.training = None
