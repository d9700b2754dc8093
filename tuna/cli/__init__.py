"""The `tuna` command, assembled from one file a subcommand.

`main` prints what the user can fix (a bad value, a missing file or package) as one message without a
traceback and exits with 2; `TUNA_TRACEBACK=1` shows where it came from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:  # the kernels alone need torch and numpy only
    raise SystemExit(f"the tuna command needs {error.name}: pip install 'tuna-kernels[train]'") from error

from tuna.cli.flags import FlagCommand
from tuna.cli.messages import message
from tuna.system.lifeline import watch_parent

__all__ = ["app", "main"]

# Each module tuna.cli.NAME has a function NAME that imports what is heavy in its body, so that --help is fast.
COMMANDS = (
    "generate", "rank", "sample", "judge", "train", "export", "score", "serve", "plan", "info", "demo",
)  # fmt: skip
GROUPS = ("data", "recipe")  # with subcommands of their own
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, OverflowError)

app = typer.Typer(
    name="tuna",
    help="Tune language models on ranked responses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from tuna import __version__

        typer.echo(f"tuna {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,  # deepspeed's launcher
) -> None:
    """Tune language models on ranked responses."""


def _assemble() -> None:
    for name in COMMANDS:
        function = getattr(import_module(f"tuna.cli.{name}"), name)
        app.command(name, cls=partial(FlagCommand, function))(lambda: None)  # type: ignore[arg-type]
    for name in GROUPS:
        app.add_typer(import_module(f"tuna.cli.{name}").app, name=name)
    bench = import_module("tuna.cli.bench")
    app.command("bench", context_settings=bench.CONTEXT)(bench.bench)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: the words after `tuna` (default: those of the process).

    Raises:
        SystemExit: always; 0 when all went well, 2 for an error of the user's, 130 for Ctrl-C.
    """
    try:
        _run(arguments)
    except KeyboardInterrupt:  # where no command runs yet, or any more
        raise SystemExit(130) from None


def _run(arguments: Sequence[str] | None) -> None:
    from tuna.console.terminal import complain, log_visibly

    log_visibly()
    watch_parent()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="tuna")
    except USER_ERRORS as error:
        if os.environ.get("TUNA_TRACEBACK", "0") not in ("", "0"):
            raise
        words = sys.argv[1:] if arguments is None else list(arguments)
        complain(f"error: {message(error, words, typer.main.get_command(app))}")
        raise SystemExit(2) from None


_assemble()
