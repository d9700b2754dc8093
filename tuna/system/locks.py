"""One process at a time in a folder: a lock of the system's, so that a process that died does not block the next."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["FolderInUse", "hold"]

logger = logging.getLogger(__name__)
LOCK = ".lock"
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some network file systems have no locks
_held: set[str] = set()  # folders this process holds, so that what it calls may ask again


class FolderInUse(ValueError):
    """Another process works in the folder."""


@contextmanager
def hold(folder: Path) -> Iterator[int | None]:
    """Hold `folder` (made where it does not exist) for this process; yields the descriptor of the lock.

    A child process that inherits the descriptor holds the folder too. None where this process holds it already, or
    where the file system has no locks.

    Raises:
        FolderInUse: another process holds it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    real = os.path.realpath(folder)
    if real in _held:
        yield None
        return
    descriptor = _take(folder)
    _held.add(real)
    try:
        yield descriptor
    finally:
        _held.discard(real)
        if descriptor is not None:
            (folder / LOCK).unlink(missing_ok=True)  # ours still, so nobody else holds a file of this name
            os.close(descriptor)
        if made:
            with suppress(OSError):
                folder.rmdir()  # nothing came of it


def _take(folder: Path) -> int | None:
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in UNSUPPORTED:
                logger.warning("%s: its file system has no locks; two runs in it would not notice each other", folder)
                return None
            by = f" ({owner})" if owner else ""
            raise FolderInUse(
                f"{folder} is in use by another run{by}; wait for it to end or choose another folder"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode())
                return descriptor
        os.close(descriptor)  # its holder removed it in between: it is no lock any more
