"""Small JSON files in the user's cache directory, kept between processes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def path_of(name: str) -> Path:
    """`$XDG_CACHE_HOME/tuna_kernels/NAME.json`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "tuna_kernels" / f"{name}.json"


def read(name: str) -> Any:
    """The value written last; None if there is none or it cannot be read."""
    try:
        return json.loads(path_of(name).read_text())
    except (OSError, ValueError, RecursionError):
        return None


def write(name: str, value: Any) -> None:
    """Write atomically; if the directory is not writable, nothing is cached."""
    _place(name, value, os.replace)


def is_writable(name: str) -> bool:
    """Whether `write` would succeed, tested by writing."""
    return _place(name, None, lambda temporary, _: None)


def keep_first(name: str, value: Any, is_valid: Callable[[Any], bool]) -> Any:
    """Store `value` unless another process stored a valid one first, and return the stored value: concurrent processes
    agree."""
    if not _place(name, value, os.link) and not is_valid(read(name)):
        write(name, value)  # replaces an invalid value; also for file systems without hard links
    kept = read(name)
    return kept if is_valid(kept) else value


def _place(name: str, value: Any, put: Callable[[str, Path], None]) -> bool:
    """Write `value` to a temporary file in the same folder and `put` it in place; returns whether it succeeded."""
    path, temporary = path_of(name), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            temporary = file.name
            json.dump(value, file, indent=1, sort_keys=True)
        put(temporary, path)
        return True
    except OSError:
        return False
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
