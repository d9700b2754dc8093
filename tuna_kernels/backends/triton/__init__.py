"""Triton kernels for NVIDIA GPUs; under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, for tests.

One kernel per file; nothing here imports triton before a kernel is asked for, so that a machine without it works.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from ...versions import interpreter_clash

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETER_CLASH = interpreter_clash()  # found here, since `why_not` is traced by torch.compile
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (decided when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not() -> str:
    """ "" if the kernels can run on this machine, else the reason why not."""
    if not INSTALLED:
        return "triton is not installed (pip install 'tuna-kernels[gpu]')"
    if is_interpreted():
        return INTERPRETER_CLASH
    if torch.cuda.is_available():
        return ""
    return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly, for tests)"


def supports(device: torch.device, *dtypes: torch.dtype) -> str:
    """ "" if the kernels serve tensors on ``device`` of these types, else the reason why not."""
    if reason := why_not():
        return reason
    wanted = "cpu" if is_interpreted() else "cuda"
    if device.type != wanted:
        return f"it computes on {wanted} tensors, the inputs are on {device}"
    bad = [str(d) for d in dtypes if d not in DTYPES]
    return f"it computes in float32 and does not take {', '.join(bad)}" if bad else ""


SLAB_BYTES = 256 << 20  # of dlogits: products of 16384 columns for 8192 rows, which cuBLAS runs at full speed
MIN_COLUMNS = 512


def slab_columns(rows: int, vocabulary: int, itemsize: int) -> int:
    """Vocabulary entries of a slab of at most ``SLAB_BYTES``, in multiples of 512; all rows go in one product."""
    fitting = SLAB_BYTES // max(1, rows * itemsize) // MIN_COLUMNS * MIN_COLUMNS
    return min(vocabulary, max(MIN_COLUMNS, fitting))


def workspace_bytes(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Forward: partials of at most 264 splits a row. Backward: a slab, float32 dX, gathered rows, for float16 a dW slab
    in float32. With unit gradients the forward takes a float32 slab and its exponentials instead."""
    columns = slab_columns(rows, vocabulary, dtype.itemsize)
    unscaled = columns * width * 4 if dtype == torch.float16 else 0
    backward = rows * columns * dtype.itemsize + rows * width * (4 + dtype.itemsize) + unscaled
    with_unit = rows * slab_columns(rows, vocabulary, 4) * (4 + dtype.itemsize) + rows * width * dtype.itemsize
    return max(rows * 264 * 12, backward, with_unit if unit_gradient_pays(width, dtype) else 0)


def unit_gradient_pays(width: int, *dtypes: torch.dtype) -> bool:
    """Whether a frozen head's forward should keep unit gradients rather than recompute logits in the backward.

    It saves one product of three, 2·D flops a logit, and costs traffic: logits are written and read twice in float32
    and once in half precision, 16 bytes a logit, where recomputing writes and reads 4. It pays where
    2·D / peak > 12 / bandwidth, D > 6 peak/bandwidth: 918 on A100 (312 Tflop/s, 2.04 TB/s), 1772 on H100 (990, 3.35),
    1690 on B200 (2250, 8.0). In float32 a product costs six times as much or more, and it always pays.
    """
    half = len(set(dtypes)) == 1 and dtypes[0] in (torch.bfloat16, torch.float16)
    return not half or width >= 2048
