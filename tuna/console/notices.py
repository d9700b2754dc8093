"""Warnings, and the template a command uses: the one given, the one the model was trained with, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

__all__ = ["given_template", "warn"]


def given_template(
    console: Console, template: str | None, model: str, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """The template to use; what is not as one would expect is said.

    Raises:
        ValueError: no template of this name; the note of the template beside the model cannot be read.
    """
    from tuna.data.templates import DEFAULT, check_name, saved_template, unused_chat_template

    if template is not None:
        check_name(template)

    saved = saved_template(model)
    if template is None:
        template = DEFAULT if saved is None else saved
        if saved is not None:
            console.print(f"template {saved!r}: what {model} was trained with")
    elif saved is not None and saved != template:
        warn(console, f"{model} was trained with template = {saved!r}, not {template!r}")
    if saved is None:
        warn(console, unused_chat_template(template, tokenizer))
    return template


def warn(console: Console, notice: str | None) -> None:
    """Print a warning, if there is one."""
    from rich.text import Text

    if notice is not None:
        console.print(Text(f"warning: {notice}", style="yellow"), soft_wrap=True)
