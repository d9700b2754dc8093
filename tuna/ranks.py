"""The end of a rank."""

from __future__ import annotations

import time

import torch
from accelerate import PartialState

REST = 0.5  # seconds; what a rank's worker thread needs on a loaded machine is some milliseconds


def end_ranks() -> None:
    """Let this rank's process group go, so that the process ends with the code it should; nothing on a single process.

    Gloo's worker threads let go of a finished collective's tensors a moment after the collective returned, and need
    Python's lock for it. A thread that first gets to ask while the interpreter is shutting down is ended by Python
    (before 3.14) inside a destructor, which aborts the process: the launcher then calls a finished run failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(REST)
        PartialState().destroy_process_group()
