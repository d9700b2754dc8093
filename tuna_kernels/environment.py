"""Installed versions and the backends chosen, as text."""

from __future__ import annotations

import os
import platform

import torch

from tuna_kernels import native
from tuna_kernels.dispatch import ENVIRONMENT_VARIABLE, available_backends, resolve_backend, why_not
from tuna_kernels.head.cpu import products_chosen


def show_config() -> str:
    """Versions, threads and backends as text, for bug reports."""
    lines = [
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.machine()}",
        f"threads {torch.get_num_threads()}, float32 products: {torch.get_float32_matmul_precision()}",
        f"{ENVIRONMENT_VARIABLE} = {os.environ.get(ENVIRONMENT_VARIABLE, '(not set)')}",
    ]
    if not native.WHY_NOT_HERE:
        lines.append(f"native code for {native.instruction_set().name} ({native.ISA_VARIABLE} can select a lower one)")
    lines += [f"{name} products: {whose}" for name, whose in products_chosen().items()]
    lines += [f"backend {name}: {reason or 'usable'}" for name, reason in available_backends().items()]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        chosen = resolve_backend("auto", torch.device(device), torch.float32)
        reason = why_not("triton" if device == "cuda" else "cpu", torch.device(device), torch.float32)
        lines.append(f"auto on {device}: {chosen}" + (f" ({reason})" if reason else ""))
    return "\n".join(lines)
