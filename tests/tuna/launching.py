"""Starting a Python module alone or as ranks of a launcher, with a time limit, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def environment() -> dict[str, str]:
    """The environment of this process without what a launcher around it would have set."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def start(
    ranks: int, module: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """``python -m module arguments`` on so many ranks of torchrun (0: alone), in a process group of its own."""
    launcher = (*TORCHRUN, f"--nproc_per_node={ranks}") if ranks else ()
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *arguments],
        cwd=cwd,
        env={**environment(), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float) -> tuple[int, str]:
    """Exit status and output; a process that takes longer than ``timeout`` seconds is killed, its ranks too."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        output, _ = process.communicate()
        raise AssertionError(f"not finished after {timeout} s:\n{output[-6000:]}") from None
    return process.returncode, output


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and all its ranks, as the end of a machine would."""
    members = group_members(process.pid)
    for pid in (process.pid, *members):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def group_members(session: int) -> list[int]:
    """Processes of a session (torchrun gives each rank a process group of its own, the session stays)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found.append(int(stat.parent.name))
    return found


def run(ranks: int, module: str, arguments: Sequence[str], cwd: Path, timeout: float = 300) -> str:
    """Run to a good end; returns the output.

    Raises:
        AssertionError: another exit status, or too slow; with the end of the output.
    """
    status, output = finish(start(ranks, module, *arguments, cwd=cwd), timeout)
    assert status == 0, output[-6000:]
    return output
