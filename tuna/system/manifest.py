"""The list of a folder's files with sizes and digests: says later which file is missing, cut, damaged or swapped."""

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

# Kinds of files that a loader may take in place of a listed one. Others (notes, pictures) do no harm.
LOADED = {".bin", ".json", ".metadata", ".pt", ".pth", ".safetensors", ""}


def files_in(folder: Path) -> list[Path]:
    """All files of a folder and below, in a fixed order."""
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
    """What `write` wrote.

    Raises:
        ValueError: the list is missing or is not as it was written; the message names it.
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
        raise ValueError(f"{path} is damaged: it is not what was written")
    found: dict[str, Any] = body
    return found


def fault(
    folder: Path,
    name: str,
    *,
    apart: Callable[[str], bool] = lambda place: False,
    hashed: Callable[[str], bool] = lambda place: True,
) -> str | None:
    """What is wrong with the files that `folder / name` lists, naming the first at fault; None if nothing is.

    Args:
        folder: the folder.
        name: of the list.
        apart: whether another list answers for a file, by its place in the folder.
        hashed: whether a file's bytes are looked at, and not its size alone.
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
            return f"{path} is not in the list of {name}"
    listed = {file: entry for file, entry in listed.items() if hashed(file)}
    try:
        digests = _digests([folder / file for file in listed])
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for (file, entry), digest in zip(listed.items(), digests, strict=True):
        if digest != entry["sha256"]:
            return f"{folder / file} is damaged: its bytes are not those that were written"
    return None


def _digests(paths: list[Path]) -> list[str]:
    """SHA-256 of each file; some at a time, since hashing lets go of Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(content_hash, paths))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
