"""Starting and ending a rank."""

from __future__ import annotations

import os
import time

import torch
from accelerate import PartialState

REST = 0.5  # seconds; a rank's worker thread needs some milliseconds on a loaded machine


# Variables in which launchers (torchrun, deepspeed, accelerate; Open MPI, MPICH and Intel MPI, MVAPICH) set the rank.
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")


def launched() -> tuple[int, int]:
    """This process's rank and the number of ranks, as set by its launcher; (0, 1) without a launcher.

    Raises:
        ValueError: Slurm's srun started several processes without a launcher.
    """
    rank, size = _number(RANKS, 0), _number(SIZES, 1)
    if size == 1 and "RANK" not in os.environ and _number(("SLURM_STEP_NUM_TASKS",), 1) > 1:
        raise ValueError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} independent processes: start one per node, and in it "
            "torchrun (configs/slurm.sh)"
        )
    return rank, size


def prepare_ranks() -> int:
    """Complete the environment of a CPU rank; returns the number of ranks.

    Raises:
        ValueError: as `launched`.
    """
    size = launched()[1]
    if size > 1 and _number(LOCAL_SIZES, 0) == size:  # mpirun on one machine sets no address
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    return size


def _number(names: tuple[str, ...], default: int) -> int:
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdigit()), default)


def end_ranks() -> None:
    """Destroy this rank's process group, so that the process ends with the right exit code; no-op on one process.

    Gloo's worker threads release the tensors of a finished collective shortly after it returned, and need the GIL for
    that. A thread that requests it during interpreter shutdown is ended by Python (before 3.14) inside a destructor,
    which aborts the process: the launcher then reports a finished run as failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(REST)
        PartialState().destroy_process_group()
