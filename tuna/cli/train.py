"""`tuna train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["train"]

STOPPED = 3  # exit code of a run that a signal ended, as of the commands that pay for calls
DATA, LOSS, BATCH, STEPS, LORA, RUN = "Data", "Loss", "Batches", "Steps", "LoRA", "Run"


def _flag(*names: str, help: str, panel: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


Text = str | None
Number = float | None
Whole = int | None


def train(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; flags win over it. Keys are the field names below.")
    ] = None,
    model: Annotated[Text, _flag(help="smollm2-135m, tiny, a folder, or a name on the hub.", panel=DATA)] = None,
    data: Annotated[
        Text, _flag(help="Ranked records: .json, .jsonl, .parquet or a dataset folder.", panel=DATA)
    ] = None,
    eval_data: Annotated[Text, _flag(help="Held-out records.", panel=DATA)] = None,
    eval_fraction: Annotated[Number, _flag(help="Hold out this share of the prompts instead.", panel=DATA)] = None,
    format: Annotated[Text, _flag(help="Shape of the records. Default: auto.", panel=DATA)] = None,
    limit: Annotated[Whole, _flag(help="Use the first so many records.", panel=DATA)] = None,
    on_bad: Annotated[
        Text, _flag(help="A record that cannot be used: fail or skip. Default: fail.", panel=DATA)
    ] = None,
    template: Annotated[
        Text,
        _flag(
            help="none, chat, alpaca or a text with {prompt}. Default: as the model was trained, or none.", panel=DATA
        ),
    ] = None,
    max_length: Annotated[Whole, _flag(help="Most tokens of prompt and response. Default: 512.", panel=DATA)] = None,
    preset: Annotated[Text, _flag(help="paper or released. Default: paper.", panel=LOSS)] = None,
    margin: Annotated[Number, _flag(help="Score gap per step of rank. Default: 0.1.", panel=LOSS)] = None,
    length_penalty: Annotated[Number, _flag(help="Exponent of the length in a score. Default: 1.", panel=LOSS)] = None,
    mle_weight: Annotated[Number, _flag(help="Weight of the likelihood term. Default: 1.", panel=LOSS)] = None,
    groups: Annotated[
        Whole,
        _flag("--groups", "--per-device-train-batch-size", help="Groups a micro-batch. Default: 1.", panel=BATCH),
    ] = None,
    tokens_per_batch: Annotated[Whole, _flag(help="Or: tree tokens a micro-batch.", panel=BATCH)] = None,
    accumulate: Annotated[
        Whole,
        _flag("--accumulate", "--gradient-accumulation-steps", help="Micro-batches a step. Default: 1.", panel=BATCH),
    ] = None,
    share: Annotated[Text, _flag(help="tree, prompt or none. Default: tree.", panel=BATCH)] = None,
    backend: Annotated[Text, _flag(help="Kernel backend. Default: auto.", panel=BATCH)] = None,
    epochs: Annotated[
        Number, _flag("--epochs", "--num-train-epochs", help="Passes over the data. Default: 1.", panel=STEPS)
    ] = None,
    steps: Annotated[Whole, _flag("--steps", "--max-steps", help="Or: so many steps.", panel=STEPS)] = None,
    lr: Annotated[
        Number, _flag("--lr", "--learning-rate", help="Peak learning rate. Default: 1e-5.", panel=STEPS)
    ] = None,
    warmup_steps: Annotated[
        Number, _flag(help="Warm-up steps, or below 1 their share. Default: 2.", panel=STEPS)
    ] = None,
    seed: Annotated[Whole, _flag(help="Of the order of the data and the hold-out. Default: 42.", panel=STEPS)] = None,
    logging_steps: Annotated[
        Number, _flag(help="Steps from log line to log line. Default: 10, fewer in a short run.", panel=STEPS)
    ] = None,
    eval_steps: Annotated[Number, _flag(help="Evaluate every so many steps.", panel=STEPS)] = None,
    save_steps: Annotated[Number, _flag(help="Checkpoint every so many steps. Default: 500.", panel=STEPS)] = None,
    lora_r: Annotated[
        Whole, _flag(help="Train a LoRA adapter of this rank. Default: 0: all weights.", panel=LORA)
    ] = None,
    lora_alpha: Annotated[Whole, _flag(help="Its scale times its rank. Default: twice the rank.", panel=LORA)] = None,
    lora_targets: Annotated[Text, _flag(help="Layers, by comma. Default: all-linear.", panel=LORA)] = None,
    output: Annotated[Text, _flag("--output", "--output-dir", help="Folder to save in.", panel=RUN)] = None,
    dtype: Annotated[
        Text, _flag(help="Of the weights: float32, bfloat16, float16. Default: float32.", panel=RUN)
    ] = None,
    deepspeed: Annotated[Text, _flag(help="DeepSpeed settings: a JSON or YAML file.", panel=RUN)] = None,
    eval_first: Annotated[
        bool | None,
        _flag("--eval-first/--no-eval-first", help="Evaluate before training too. Default: yes.", panel=RUN),
    ] = None,
    resume: Annotated[bool | None, _flag("--resume", help="Go on from the last checkpoint.", panel=RUN)] = None,
    allow_changes: Annotated[
        bool | None,
        _flag("--allow-changes", help="With --resume: though data, seed, loss or batches are others.", panel=RUN),
    ] = None,
    trust_checkpoint: Annotated[
        bool | None,
        _flag("--trust-checkpoint", help="With --resume: let a checkpoint from elsewhere run code.", panel=RUN),
    ] = None,
    overwrite: Annotated[bool | None, _flag("--overwrite", help="Write over an earlier run.", panel=RUN)] = None,
    yes: Annotated[bool | None, _flag("--yes", "-y", help="Do not ask.", panel=RUN)] = None,
    set_: Annotated[
        list[str] | None,
        _flag("--set", help="key=value: any other field of TunaConfig, such as bf16=true.", panel=RUN),
    ] = None,
) -> None:
    """Train a model on ranked responses.

    Shows the best and the worst response of three groups first: a reversed order is this field's commonest
    silent mistake. Writes the model, metrics.json and a picture of the loss. SIGTERM and Ctrl-C end it after the
    running step, with a checkpoint and exit code 3.
    """
    flags = dict(locals())
    file, overrides = flags.pop("config"), flags.pop("set_") or []
    from tuna.cli.messages import FLAG_FIELDS
    from tuna.console.terminal import Terminal, complain
    from tuna.system import lifeline
    from tuna.train.distributed import end_ranks, launched
    from tuna.train.run import run_training
    from tuna.train.run_settings import merge_settings
    from tuna.train.stopping import Stopped

    rank, _ = launched()
    lifeline.watch_launcher()
    run, settings = merge_settings(file, overrides, {FLAG_FIELDS.get(k, k): value for k, value in flags.items()})
    try:
        run_training(run, settings, Terminal(quiet=rank > 0))
    except Stopped as stop:
        if rank == 0:
            complain(f"{stop}; the same command with --resume goes on from there")
        end_ranks()
        raise typer.Exit(STOPPED) from None
    end_ranks()
