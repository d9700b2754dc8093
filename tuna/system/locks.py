"""Exclusive use of a folder, by an operating-system lock that is released when the process ends."""

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
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some network file systems do not support locks
_held: set[str] = set()  # folders held by this process, so that nested calls succeed


class FolderInUse(ValueError):
    """The folder is in use by another process."""


@contextmanager
def hold(folder: Path) -> Iterator[int | None]:
    """Lock `folder` (created if missing) for this process; yields the descriptor of the lock.

    A child process that inherits the descriptor holds the lock too. Yields None if this process already holds the lock
    or the file system does not support locks.

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
            (folder / LOCK).unlink(missing_ok=True)  # still locked here, so no other process holds a file of this name
            os.close(descriptor)
        if made:
            with suppress(OSError):
                folder.rmdir()  # nothing was written


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
                logger.warning(
                    "%s: the file system does not support locks; two runs here would not be detected", folder
                )
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
        os.close(descriptor)  # removed by its holder in the meantime: no longer a lock
