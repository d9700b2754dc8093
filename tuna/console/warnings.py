"""Warnings: rows left out, oddities of the data, a template other than the one a model was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from tuna.data.problems import Problem

__all__ = ["given_template", "print_problems", "warn"]


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


def print_problems(console: Console, problems: Sequence[Problem] | Sequence[str]) -> None:
    """The first problems, a line each, and how many more there are."""
    from rich.text import Text

    from tuna.data.problems import problem_lines

    for line in problem_lines(problems):
        console.print(Text(line, style="yellow"), soft_wrap=True)
