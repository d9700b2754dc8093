"""Whether Triton kernels can run here; with `TRITON_INTERPRET=1` the same kernels run on CPU tensors, for tests.

Nothing here imports triton, so that it is optional.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from tuna_kernels.versions import interpreter_clash

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETER_CLASH = interpreter_clash()  # found here, since `why_not_here` is traced by torch.compile
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (decided when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_here() -> str:
    """ "" if the kernels can run on this machine, else the reason why not."""
    if not INSTALLED:
        return "triton is not installed (pip install 'tuna-kernels[gpu]')"
    if is_interpreted():
        return INTERPRETER_CLASH
    if torch.cuda.is_available():
        return ""
    return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly, for tests)"


def why_not(device: torch.device, *dtypes: torch.dtype) -> str:
    """ "" if the kernels support tensors on `device` with these dtypes, else the reason why not."""
    if reason := why_not_here():
        return reason
    wanted = "cpu" if is_interpreted() else "cuda"
    if device.type != wanted:
        return f"it computes on {wanted} tensors, the inputs are on {device}"
    bad = [str(d) for d in dtypes if d not in DTYPES]
    return f"it computes in float32 and does not support {', '.join(bad)}" if bad else ""
