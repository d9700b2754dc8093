"""Processes that end when the process that started them ends, for whatever reason.

`start` gives a child the read end of a pipe whose write end is held by this process only, so the child notices when
this process ends, even by SIGKILL. In the child, `watch_parent` waits for that in a thread and stops as on Ctrl-C, so
that training saves a checkpoint and paid answers in flight are recorded. Ranks are started by third-party launchers
and therefore watch the launcher's process id (`watch_launcher`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

__all__ = ["start", "watch_launcher", "watch_parent"]

VARIABLE = "TUNA_LIFELINE"
GRACE = 60.0  # seconds from the stop to a forced exit
LOOK = 0.5  # seconds between checks of the launcher


def start(command: Sequence[str], *, pass_fds: Sequence[int] = (), **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of a command that calls `watch_parent` at its start: it ends with this process."""
    reading, writing = os.pipe()
    env = {**(options.pop("env", None) or os.environ), VARIABLE: str(reading)}
    try:
        process = subprocess.Popen(command, env=env, pass_fds=[reading, *pass_fds], **options)
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    # The write end stays open until this process ends, at the cost of one descriptor per child.
    return process


def watch_parent() -> None:
    """If this process was started by `start`, stop it when its parent ends."""
    descriptor = os.environ.pop(VARIABLE, None)  # not for child processes: they do not inherit the pipe
    if descriptor is not None:
        _watch(lambda: os.read(int(descriptor), 1) == b"")


def watch_launcher() -> None:
    """Stop this rank when its launcher ends; does nothing without a launcher."""
    if "RANK" not in os.environ:
        return
    parents = _launchers()

    def gone() -> bool:
        while os.getppid() == parents[0][0] and all(_alive(*parent) for parent in parents[1:]):
            time.sleep(LOOK)
        return True

    if parents:
        _watch(gone)


def _watch(gone: Callable[[], bool]) -> None:
    def wait() -> None:
        with suppress(OSError):
            if gone():
                _stop()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _stop() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # pipes without a reader: a write would end this process before the checkpoint is saved
        os.dup2(nowhere, stream)
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # for example a background command of a script
    os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _launchers() -> list[tuple[int, float]]:
    """Process ids and start times of the launcher: the parent, and its ancestors that belong to the same launcher.

    Shells are excluded: ranks may be started by hand and outlive the shell.
    """
    import psutil

    found: list[tuple[int, float]] = []
    with suppress(psutil.Error):
        for parent in psutil.Process().parents():
            if not _is_launcher(parent):
                break
            found.append((parent.pid, parent.create_time()))
    return found


def _is_launcher(process: Any) -> bool:
    """Whether a process belongs to `deepspeed`, `accelerate`, torchrun or an MPI."""
    if process.name() in ("bash", "dash", "fish", "sh", "zsh"):
        return False
    words = " ".join(os.path.basename(word) for word in process.cmdline()[:4])
    names = ("deepspeed", "accelerate", "torchrun", "torch.distributed", "mpirun", "mpiexec", "orted", "prted", "hydra")
    return any(name in words for name in names)


def _alive(pid: int, started: float) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        return bool(process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
