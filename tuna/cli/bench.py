"""`tuna bench PROGRAM …`: the benchmark programs under one command. Each is also `python -m benchmarks.PROGRAM`."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench"]

PROGRAMS = ("kernels", "step", "profile", "attention", "sharing", "growth", "endpoint", "diff", "document")
CONTEXT = {"help_option_names": [], "ignore_unknown_options": True, "allow_extra_args": True}


def bench(
    context: typer.Context,
    program: Annotated[str, typer.Argument(help="Program to run; without it, the programs are listed.")] = "",
) -> None:
    """Benchmark kernels, attention, sharing and whole steps against other implementations on this machine."""
    found = _programs()
    if program in ("", "-h", "--help"):
        typer.echo("tuna bench PROGRAM [options]; `tuna bench PROGRAM --help` shows its options\n")
        for name, path in found.items():
            typer.echo(f"  {name:<10} {_summary(path)}")
        return
    if program not in found:
        raise ValueError(f"program {program!r} is not one of {', '.join(found)}")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(import_module(f"benchmarks.{program}").main)
    app(args=context.args, prog_name=f"tuna bench {program}")


def _programs() -> dict[str, Path]:
    """Each program and its file.

    Raises:
        ValueError: this installation is without the repository, where they are.
    """
    repository = Path(__file__).resolve().parents[2]
    found = {name: path for name in PROGRAMS if (path := repository / "benchmarks" / f"{name}.py").is_file()}
    if not found:
        raise ValueError(
            "the benchmarks are not part of the installed package: clone the repository and install it with "
            "pip install --editable '.[bench]'"
        )
    if str(repository) not in sys.path:
        sys.path.append(str(repository))
    return found


def _summary(source: Path) -> str:
    """First line of a module's docstring behind its command, without importing it."""
    text = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(text.partition(": ")[2].split())
