"""Small JSON files that the library remembers between processes, in the user's cache directory."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def path_of(name: str) -> Path:
    """``$XDG_CACHE_HOME/tuna_kernels/NAME.json``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tuna_kernels" / f"{name}.json"


def read(name: str) -> Any:
    """What was written last; None where nothing was, or it cannot be read."""
    try:
        return json.loads(path_of(name).read_text())
    except (OSError, ValueError):
        return None


def write(name: str, value: Any) -> None:
    """Atomic; a directory that cannot be written only means that nothing is remembered."""
    path = path_of(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(value, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        return
