"""Errors as the command line shows them: settings by the flags typed, packages by the extra they belong to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

__all__ = ["install_hint", "message", "refuse_given"]

DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn"}  # modules that are called otherwise than their package


def message(error: BaseException, words: Sequence[str], command: Any) -> str:
    """The text of a user error.

    Args:
        error: what was raised.
        words: the command line.
        command: the click command at the root.
    """
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.partition('.')[0]} is not installed: {install_hint(error.name)}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ImportError):  # perhaps of what the command's own flags need
        return str(error)
    return _as_flags(str(error) or type(error).__name__, words, command)


def install_hint(module: str) -> str:
    """How to install the package of a module: by our extra that lists it, or by its own name."""
    name = DISTRIBUTIONS.get(module.partition(".")[0], module.partition(".")[0]).replace("_", "-").lower()
    try:
        listed = requires("tuna-kernels") or []
    except PackageNotFoundError:
        listed = []
    for line in listed:
        wanted, _, marker = line.partition(";")
        found = re.match(r"[A-Za-z0-9._-]+", wanted)
        extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
        if found and extra and found[0].replace("_", "-").lower() == name and extra[1] not in ("all", "dev", "bench"):
            return f"pip install 'tuna-kernels[{extra[1]}]'"
    return f"pip install {name}"


def refuse_given(context: Any, reason: str, *names: str) -> None:
    """Refuse flags of the running command (its `typer.Context`) that were typed though they would do nothing.

    Raises:
        ValueError: one was; the message names it and the reason.
    """
    for name in names:
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
            raise ValueError(f"{_flag_of(context.command, name)} would have no effect: {reason}")


def _flag_of(command: Any, name: str) -> str:
    return next((item.opts[0] for item in command.params if item.name == name), f"--{name.replace('_', '-')}")


def _as_flags(text: str, words: Sequence[str], root: Any) -> str:
    """An error with settings under the names they are typed by, and advice for Python as advice for the command line.

    A setting is known by its value (`name = 3`), one of several words by its name alone. One from a settings file
    keeps the name it has there.
    """
    command = root
    for word in (word for word in words if not word.startswith("-")):
        following = getattr(command, "commands", {}).get(word)
        if following is None:
            break
        command = following
    if any(item.name == "on_bad" for item in command.params):
        text = text.replace("on_bad='skip'", "--on-bad skip")
    else:
        text = text.replace(" (on_bad='skip' leaves them out)", "")
    typed = {word.partition("=")[0] for word in words}
    from_file = "--config" in typed or "--set" in typed
    for option in command.params:
        flags = [flag for flag in option.opts if flag.startswith("--")]
        flag = next((flag for flag in flags if flag in typed), flags[0] if flags else "")
        if not flag or (from_file and flag not in typed):
            continue
        for name in {option.name, flags[0].removeprefix("--").replace("-", "_")}:
            value = "" if "_" in name else "(?= = )"
            text = re.sub(rf"(?<![\w.'/-]){name}(?![\w'/]){value}", flag, text)
    return text
