"""The start and the end of a rank."""

from __future__ import annotations

import os
import time

import torch
from accelerate import PartialState

REST = 0.5  # seconds; what a rank's worker thread needs on a loaded machine is some milliseconds


# Where launchers (torchrun, deepspeed, accelerate; Open MPI, MPICH and Intel MPI, MVAPICH) write a process's number.
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")


def launched() -> tuple[int, int]:
    """This process's rank and the number of ranks, as its launcher says; (0, 1) where there is none.

    Raises:
        ValueError: Slurm's srun started several processes and none of them a launcher.
    """
    rank, size = _number(RANKS, 0), _number(SIZES, 1)
    if size == 1 and "RANK" not in os.environ and _number(("SLURM_STEP_NUM_TASKS",), 1) > 1:
        raise ValueError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} processes that do not know of each other: start one a "
            "node, and in it torchrun (configs/slurm.sh)"
        )
    return rank, size


def prepare_ranks() -> int:
    """Make what a CPU rank's start needs complete; returns the number of ranks.

    Raises:
        ValueError: as `launched`.
    """
    size = launched()[1]
    if size > 1 and _number(LOCAL_SIZES, 0) == size:  # mpirun on one machine names no address
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    return size


def _number(names: tuple[str, ...], default: int) -> int:
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdigit()), default)


def end_ranks() -> None:
    """Let this rank's process group go, so that the process ends with the code it should; nothing on a single process.

    Gloo's worker threads let go of a finished collective's tensors a moment after the collective returned, and need
    Python's lock for it. A thread that first gets to ask while the interpreter is shutting down is ended by Python
    (before 3.14) inside a destructor, which aborts the process: the launcher then calls a finished run failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(REST)
        PartialState().destroy_process_group()
