"""Atomic writing of files, and content hashes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["content_hash", "finite", "replacing", "sync", "write_json"]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that replaces `path` on success and is removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the target's folder: a rename is atomic only within one file system.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
        sync(draft)  # otherwise a power failure could leave the new name without its content
        draft.replace(path)
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def sync(path: Path) -> None:
    """Sync a file, or a folder with the names of its files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically; non-finite numbers become null, since JSON has none."""
    with replacing(path) as file:
        file.write((json.dumps(finite(content), ensure_ascii=False, indent=1) + "\n").encode())


def finite(value: Any) -> Any:
    """`value` with every non-finite number replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def content_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hexadecimal) of a file's bytes, or of the names and bytes of a folder's files.

    Raises:
        FileNotFoundError: no such file or folder.
    """
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    parts = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        parts.update(f"{file_path.relative_to(path).as_posix()}\0{content_hash(file_path)}\n".encode())
    return parts.hexdigest()
