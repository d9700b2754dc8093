"""`tuna train`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from tuna.cli.flags import Flags

__all__ = ["train"]

STOPPED = 3  # exit code of a run that a signal ended, as of the commands that pay for calls
# A flag that was not given leaves the setting to --set, the file and the dataclass, in this order.
Run = functools.partial(Flags, "tuna.train.run_settings:RunSettings", unset=True)
Config = functools.partial(Flags, "tuna.train.config:TunaConfig", unset=True)


def train(
    *,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings by field name; flags and --set take precedence.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field of TunaConfig as key=value, such as bf16=true; may be repeated."),
    ] = None,
    flags: Annotated[
        dict[str, Any],
        Run("model data eval_data eval_fraction format limit", panel="Data"),
        Config("on_bad template max_length", panel="Data"),
        Config("preset margin length_penalty mle_weight", panel="Loss"),
        Config("groups=per_device_train_batch_size tokens_per_batch", panel="Batches"),
        Config("accumulate=gradient_accumulation_steps share backend", panel="Batches"),
        Config("epochs=num_train_epochs steps=max_steps lr=learning_rate warmup_steps seed", panel="Steps"),
        Config("logging_steps eval_steps save_steps", panel="Steps"),
        Run("lora_r lora_alpha lora_targets", panel="LoRA"),
        Config("output=output_dir", panel="Run"),
        Run("dtype", panel="Run"),
        Config("deepspeed", panel="Run"),
        Run("eval_first resume", panel="Run"),
        Config("allow_changes trust_checkpoint", panel="Run"),
        Run("overwrite y=yes", panel="Run"),
    ],
) -> None:
    """Train a model on ranked responses.

    Shows the best and the worst response of three groups first, since a reversed order is easily overlooked. Writes the
    model, metrics.json and a plot of the loss. SIGTERM and Ctrl-C end the run after the current step, with a checkpoint
    and exit code 3.
    """
    from tuna.console.terminal import Terminal, complain
    from tuna.system import lifeline
    from tuna.train.distributed import end_ranks, launched
    from tuna.train.run import run_training
    from tuna.train.run_settings import merge_settings
    from tuna.train.stopping import Stopped

    rank, _ = launched()
    lifeline.watch_launcher()
    run, settings = merge_settings(config, set_ or [], flags)
    try:
        run_training(run, settings, Terminal(quiet=rank > 0))
    except Stopped as stop:
        if rank == 0:
            complain(f"{stop}; the same command with --resume continues from there")
        end_ranks()
        raise typer.Exit(STOPPED) from None
    end_ranks()
