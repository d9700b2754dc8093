"""Options that several commands have and that no dataclass quick to import has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from tuna.system import common_settings
from tuna.system.common_settings import HELP

__all__ = [
    "Data", "Device", "Dtype", "Format", "Json", "JsonFile", "Limit", "MaxLength", "Model", "OnBad",
    "Template", "Threads", "at_least",
]  # fmt: skip


def at_least(least: int, help: str, panel: str | None = None) -> Any:
    """An option that refuses smaller numbers, in the words of the dataclasses."""

    def check(value: Any) -> Any:
        if value is not None and not value >= least:
            raise typer.BadParameter(f"{value} must be at least {least}")
        return value

    return typer.Option(callback=check, help=help, rich_help_panel=panel)


Data: TypeAlias = Annotated[str, typer.Option(help=HELP["data"])]
Device: TypeAlias = Annotated[str | None, typer.Option(help="Device as torch names it; without it, a GPU if present.")]
Dtype: TypeAlias = Annotated[common_settings.Dtype, typer.Option(help=HELP["dtype"])]
Format: TypeAlias = Annotated[str, typer.Option(help=HELP["format"])]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
JsonFile: TypeAlias = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Limit: TypeAlias = Annotated[int | None, at_least(1, HELP["limit"])]
MaxLength: TypeAlias = Annotated[
    int,
    at_least(2, HELP["max_length"]),
]
Model: TypeAlias = Annotated[str, typer.Option(help=HELP["model"])]
OnBad: TypeAlias = Annotated[
    Literal["fail", "skip"], typer.Option(help="Whether an unusable record stops the command or is skipped.")
]
Template: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Prompt template: none, chat, alpaca or a text with {prompt}; without it, the one saved with the model."
    ),
]
Threads: TypeAlias = Annotated[int | None, at_least(1, "CPU threads; without it, torch decides.")]
