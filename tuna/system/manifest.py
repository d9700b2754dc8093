"""A list of a folder's files with sizes and digests, to detect missing, truncated, damaged or replaced files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tuna.system.writing import content_hash, replacing

__all__ = ["fault", "files_in", "read", "write"]

# File types that a loader may prefer over a listed file. Others (notes, pictures) are harmless.
LOADED = {".bin", ".json", ".metadata", ".pt", ".pth", ".safetensors", ""}


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, in a fixed order."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def write(folder: Path, name: str, content: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Write `content` and the list of `files` to `folder / name`, atomically."""
    paths = list(files)
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    body = {**content, "files": listed}
    with replacing(folder / name) as file:
        file.write((json.dumps({"digest": _digest(body), **body}, indent=1) + "\n").encode())


def read(folder: Path, name: str) -> dict[str, Any]:
    """Read a list written by `write`.

    Raises:
        ValueError: the list is missing or was changed; the message names it.
    """
    path = folder / name
    try:
        body = json.loads(path.read_text("utf-8"))
        whole = body.pop("digest") == _digest(body) and isinstance(body["files"], dict)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__})") from None
    if not whole:
        raise ValueError(f"{path} is damaged: its content has changed")
    found: dict[str, Any] = body
    return found


def fault(
    folder: Path,
    name: str,
    *,
    apart: Callable[[str], bool] = lambda place: False,
    hashed: Callable[[str], bool] = lambda place: True,
) -> str | None:
    """The first fault in the files listed by `folder / name`, as a sentence; None if there is none.

    Args:
        folder: the folder.
        name: of the list.
        apart: whether a file, by its path in the folder, belongs to another list.
        hashed: whether to check a file's digest, not just its size.
    """
    try:
        listed = read(folder, name)["files"]
    except ValueError as error:
        return str(error)
    for file, entry in listed.items():
        path = folder / file
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} is damaged: {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
    for path in files_in(folder):
        place = path.relative_to(folder).as_posix()
        if place in listed or place == name or apart(place):
            continue
        if path.suffix in LOADED and path.name[0] != ".":
            return f"{path} is not listed in {name}"
    listed = {file: entry for file, entry in listed.items() if hashed(file)}
    try:
        digests = _digests([folder / file for file in listed])
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for (file, entry), digest in zip(listed.items(), digests, strict=True):
        if digest != entry["sha256"]:
            return f"{folder / file} is damaged: its content has changed"
    return None


def _digests(paths: list[Path]) -> list[str]:
    """SHA-256 of each file, several in parallel, since hashing releases the GIL."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(content_hash, paths))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
