"""What a benchmark ran on: processor, threads, versions, commit. No path and no host name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

CHOOSERS = (
    "TUNA_KERNELS_BACKEND",
    "TUNA_KERNELS_CPU_ISA",
    "TUNA_KERNELS_CPU_PRODUCTS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)


@dataclass(frozen=True)
class Machine:
    """The machine and the software of one run.

    `load` is the one-minute load average when the record was made: well above the number of threads used,
    other programs were running and only ratios mean something. `memory` is in bytes. `environment`: what was set
    of the variables that choose code (`CHOOSERS`).
    """

    processor: str
    cores: int
    memory: int
    threads: int
    system: str
    cpu_capability: str
    blas: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    load: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


def describe_machine(packages: tuple[str, ...] = ()) -> Machine:
    """The present machine, with the versions of torch, numpy and `packages` (distribution names)."""
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        blas="MKL" if torch.backends.mkl.is_available() else "other",  # type: ignore[no-untyped-call]
        python=platform.python_version(),
        versions={name: version_of(name) for name in sorted({"torch", "numpy", *packages})},
        commit=_commit(),
        load=round(os.getloadavg()[0], 2),
        environment={name: os.environ[name] for name in CHOOSERS if name in os.environ},
    )


def version_of(distribution: str) -> str:
    """Version of an installed distribution, or `"absent"`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Commit of this repository, with `+` when the work tree differs from it; empty outside a repository."""

    def git(*words: str) -> str:
        here = Path(__file__).resolve().parent
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:
        return ""
