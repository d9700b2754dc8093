"""The last line of a command: what usually comes next."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["next_command", "say_next"]


def next_command(command: str, **flags: Any) -> str:
    """A command line; words in capitals stand for what the user chooses, None and False for a flag left out."""
    words = ["tuna", command]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(shlex.quote(str(value)))
    return " ".join(words)


def say_next(console: Console, command: str, **flags: Any) -> None:
    """Print it."""
    console.print(f"next: {next_command(command, **flags)}", markup=False, highlight=False, soft_wrap=True)
