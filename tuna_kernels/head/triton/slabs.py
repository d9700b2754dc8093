"""Size of a slab of logits, and when a frozen head keeps unit gradients instead."""

from __future__ import annotations

import torch

SLAB_BYTES = 256 << 20  # of dlogits: products of 16384 columns for 8192 rows, which cuBLAS runs at full speed
MIN_COLUMNS = 512


def slab_columns(rows: int, vocabulary: int, itemsize: int) -> int:
    """Vocabulary entries in a slab of at most `SLAB_BYTES`, a multiple of 512; all rows are in one product."""
    fitting = SLAB_BYTES // max(1, rows * itemsize) // MIN_COLUMNS * MIN_COLUMNS
    return min(vocabulary, max(MIN_COLUMNS, fitting))


def workspace_bytes(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Peak bytes. Forward: partials of at most 264 splits per row. Backward: a slab, float32 dX, gathered rows, for
    float16 a dW slab in float32. With unit gradients the forward needs a float32 slab and its exponentials instead."""
    columns = slab_columns(rows, vocabulary, dtype.itemsize)
    unscaled = columns * width * 4 if dtype == torch.float16 else 0
    backward = rows * columns * dtype.itemsize + rows * width * (4 + dtype.itemsize) + unscaled
    with_unit = rows * slab_columns(rows, vocabulary, 4) * (4 + dtype.itemsize) + rows * width * dtype.itemsize
    return max(rows * 264 * 12, backward, with_unit if unit_gradient_pays(width, dtype) else 0)


def unit_gradient_pays(width: int, *dtypes: torch.dtype) -> bool:
    """Whether a frozen head's forward should keep unit gradients instead of recomputing logits in the backward.

    It saves one product of three, 2·D flops per logit, and costs traffic: logits are written and read twice in float32
    and once in half precision, 16 bytes per logit, while recomputing writes and reads 4. It pays if
    2·D / peak > 12 / bandwidth, D > 6 peak/bandwidth: 918 on A100 (312 Tflop/s, 2.04 TB/s), 1772 on H100 (990, 3.35),
    1690 on B200 (2250, 8.0). In float32 a product costs at least six times as much, and it always pays.
    """
    half = len(set(dtypes)) == 1 and dtypes[0] in (torch.bfloat16, torch.float16)
    return not half or width >= 2048
