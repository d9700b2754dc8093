"""`tuna export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuna.system.common_settings import Dtype

__all__ = ["export"]


def export(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint, an adapter, or a run, whose last complete checkpoint is exported.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write, which must not exist.")],
    model: Annotated[str | None, typer.Option(help="Base model of an adapter, if not the one it names.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights, if not that of the model.")] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Export a checkpoint that may run code when it is loaded.")
    ] = False,
) -> None:
    """Write a checkpoint as a plain Hugging Face folder: ZeRO shards joined, LoRA merged, safetensors."""
    import torch

    from tuna.console.next import next_command
    from tuna.console.terminal import complain, say
    from tuna.train.export import export as write

    done = write(
        source, output, model=model, dtype=None if dtype is None else getattr(torch, dtype), trust=trust_checkpoint
    )
    say(f"{done} is in {output}")
    complain(f"next: {next_command('serve', model=output)}")
