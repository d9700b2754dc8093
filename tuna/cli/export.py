"""`tuna export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export"]


def export(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint, an adapter, or a run: its last complete checkpoint is taken.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    model: Annotated[
        str | None, typer.Option(help="What an adapter was trained on. Default: what the adapter says.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: that of the model.")] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Let a checkpoint from elsewhere run code as it is loaded.")
    ] = False,
) -> None:
    """Write a checkpoint as a plain Hugging Face folder: ZeRO shards joined, LoRA merged, safetensors."""
    import torch

    from tuna.console.next import next_command
    from tuna.console.terminal import complain, say
    from tuna.train.export import export as write

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype = {dtype!r} is not one of 'float32', 'bfloat16', 'float16'")
    done = write(
        source, output, model=model, dtype=None if dtype is None else getattr(torch, dtype), trust=trust_checkpoint
    )
    say(f"{done} is in {output}")
    complain(f"next: {next_command('serve', model=output)}")
