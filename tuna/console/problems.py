"""What commands print of rows that cannot be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tuna.data.problems import Problem

__all__ = ["print_problems"]


def print_problems(console: Console, problems: Sequence[Problem] | Sequence[str]) -> None:
    """The first problems, a line each, and how many more there are."""
    from rich.text import Text

    from tuna.data.problems import problem_lines

    for line in problem_lines(problems):
        console.print(Text(line, style="yellow"), soft_wrap=True)
