"""Options that several commands have and no dataclass holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

__all__ = [
    "Data", "Device", "Dtype", "DtypeName", "Format", "Json", "JsonFile", "Limit", "MaxLength", "Model", "OnBad",
    "Template", "Threads", "at_least",
]  # fmt: skip


def at_least(least: int, help: str, panel: str | None = None) -> Any:
    """An option that refuses smaller numbers, in the words of the dataclasses."""

    def check(value: Any) -> Any:
        if value is not None and not value >= least:
            raise typer.BadParameter(f"{value} must be at least {least}")
        return value

    return typer.Option(callback=check, help=help, rich_help_panel=panel)


DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]

Data: TypeAlias = Annotated[str, typer.Option(help="Ranked records: .json, .jsonl, .parquet or a dataset folder.")]
Device: TypeAlias = Annotated[str | None, typer.Option(help="Device as torch names it; without it, a GPU if present.")]
Dtype: TypeAlias = Annotated[DtypeName, typer.Option(help="Dtype of the weights.")]
Format: TypeAlias = Annotated[
    str, typer.Option(help="Format of the records; see tuna data convert --help for their names.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
JsonFile: TypeAlias = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Limit: TypeAlias = Annotated[int | None, at_least(1, "Use only the first N records.")]
MaxLength: TypeAlias = Annotated[
    int,
    at_least(2, "Maximum length of prompt plus response, in tokens; cuts responses only."),
]
Model: TypeAlias = Annotated[
    str, typer.Option(help="Model: smollm2-135m, tiny, a folder, or a name on the Hugging Face hub.")
]
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
