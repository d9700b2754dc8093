"""The tables that a training run prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tuna.data.tokenization import TokenizedGroup, TokenStats
from tuna.train.trainer import TunaTrainer

__all__ = ["comparison", "summary", "total_steps"]


def _steps_per_epoch(trainer: TunaTrainer) -> int:
    return math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)


def total_steps(trainer: TunaTrainer) -> int:
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(_steps_per_epoch(trainer) * args.num_train_epochs)


def summary(trainer: TunaTrainer, stats: TokenStats, held_out: Sequence[TokenizedGroup] | None) -> Table:
    args, steps, per_epoch = trainer.args, total_steps(trainer), _steps_per_epoch(trainer)
    batch = (
        f"{args.per_device_train_batch_size} groups"
        if args.tokens_per_batch is None
        else f"up to {args.tokens_per_batch:,} tokens"
    )
    model: Any = trainer.model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = {
        "groups": f"{stats.groups:,} to train on, {len(held_out or ()):,} held out",
        "responses": f"{stats.candidates:,} ({stats.cut_responses / stats.candidates:.1%} cut to the limit)",
        "tokens an epoch": f"{stats.tree:,} instead of {stats.unpadded:,} in separate sequences, "
        f"{stats.padded:,} padded",
        "saved by sharing": f"{1 - stats.tree / stats.unpadded:.1%}; with padding {1 - stats.tree / stats.padded:.1%}",
        "batch": f"{batch} x {args.gradient_accumulation_steps} x {trainer.accelerator.num_processes} processes",
        "steps": f"{steps:,} ({per_epoch:,} an epoch)",
        "parameters": f"{trainable:,} trained",
        "loss": f"{args.preset}, margin {args.margin:g}, length penalty {args.length_penalty:g}, "
        f"likelihood weight {args.mle_weight:g}",
    }
    table = Table(title="Training", show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def comparison(before: dict[str, float] | None, after: dict[str, float]) -> Table:
    table = Table("held out", "before", "after", title="Result", title_justify="left")
    for name in ("loss", "loss/rank", "loss/mle", "rank/accuracy", "rank/top1", "rank/kendall", "margin/mean"):
        key = f"eval_{name}"
        if key in after:
            table.add_row(name, "" if before is None else f"{before[key]:.4f}", f"{after[key]:.4f}")
    return table
