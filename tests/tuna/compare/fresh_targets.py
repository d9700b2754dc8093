"""What the tests of the memory meters run in a fresh process."""

import os
import time
from pathlib import Path

import torch

from tuna.compare.memory_meter import ResidentPeak, resident_peak


def touch(mebibytes: int) -> ResidentPeak:
    """Resident growth while so many MiB are written, in a process that held and freed as many before."""
    held = torch.ones(mebibytes, 2**20, dtype=torch.uint8)
    del held
    return resident_peak(lambda: torch.ones(mebibytes, 2**20, dtype=torch.uint8))


def fail() -> None:
    raise ValueError("this target always fails")


def linger(file: str) -> None:
    """Write down this process's id, and go on for longer than any test."""
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)
