"""Processes that end with the one that started them, however that one ends.

`start` gives a child the reading end of a pipe whose writing end only we hold: it ends with us, even by SIGKILL. The
child's command line (`watch_parent`) waits for that on a thread and stops as on Ctrl-C, so that training saves a
checkpoint and paid answers on their way are written down. Ranks are started by launchers that are not ours, and so
look after their launcher by its process id (`watch_launcher`).
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
GRACE = 60.0  # seconds from the stop to the end by force
LOOK = 0.5  # seconds between looks at the launcher


def start(command: Sequence[str], *, pass_fds: Sequence[int] = (), **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of a command that calls `watch_parent` first: it ends with this process."""
    reading, writing = os.pipe()
    env = {**(options.pop("env", None) or os.environ), VARIABLE: str(reading)}
    try:
        process = subprocess.Popen(command, env=env, pass_fds=[reading, *pass_fds], **options)
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    # The writing end is left open: the system closes it when this process ends. It costs a descriptor a child.
    return process


def watch_parent() -> None:
    """If `start` started this process, stop it when the process that did so is gone."""
    descriptor = os.environ.pop(VARIABLE, None)  # not for children of ours: they do not have the pipe
    if descriptor is not None:
        _watch(lambda: os.read(int(descriptor), 1) == b"")


def watch_launcher() -> None:
    """Stop this rank when the launcher that started it is gone; nothing where none did."""
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
    for stream in (1, 2):  # may be pipes that nobody reads any more: a line would end us before the checkpoint is saved
        os.dup2(nowhere, stream)
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as of a command that a script put in the background
    os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _launchers() -> list[tuple[int, float]]:
    """Process ids and start times of the launcher: the parent, and what started that as part of one launcher.

    Not of a shell: ranks may be started by hand and outlive it.
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
    """Whether a process is one of `deepspeed`'s, `accelerate`'s, torchrun's or an MPI's own."""
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
