"""The `--template` flag of commands that have a model at hand."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

__all__ = ["TemplateOption"]

TemplateOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--template", help="none, chat, alpaca or a text with {prompt}. Default: as the model was trained, or none."
    ),
]
