"""Matrix products: dtypes of those inside kernels, and cuBLAS for those outside."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from tuna_kernels.gpu import launch
from tuna_kernels.gpu.availability import is_interpreted
from tuna_kernels.head.tiled import Inputs, LinearHead

HALF = (torch.bfloat16, torch.float16)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Products(NamedTuple):
    """Constants of a kernel: the dtype both factors are converted to, and how float32 is multiplied."""

    TYPE: Any  # for hidden and weight
    LOW_TYPE: Any  # for the low-rank pair
    PRECISION: str


def product_type(left: torch.dtype, right: torch.dtype) -> torch.dtype:
    """The dtype both factors are converted to: their own if it is the same, else float32."""
    return left if left == right else torch.float32


def in_kernel(inputs: Inputs, head: LinearHead) -> Products:
    """Constants for `h W^T` and the low-rank term."""

    def common(left: Tensor, right: Tensor) -> Any:
        return TYPES[product_type(left.dtype, right.dtype)]

    low = tl.float32
    if inputs.low_rank is not None and head.low_rank_weight is not None:
        low = common(inputs.low_rank, head.low_rank_weight)
    precision = launch.float32_precision("ieee" if is_interpreted() else "bf16x6")  # the interpreter has no bf16x6
    return Products(common(inputs.hidden, head.weight), low, precision)


def multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """`out = left @ right` or, with `add`, `out += left @ right`; accumulated in float32 and rounded once.

    `left` is half precision or float32; with a half-precision `left` a float32 `right` is split into two
    half-precision parts, so that the product stays on tensor cores and `left` is not converted.
    """
    if left.dtype in HALF and right.dtype == torch.float32:
        high = right.to(torch.bfloat16 if left.dtype == torch.bfloat16 else left.dtype)
        multiply(out, left, high, add=add)
        multiply(out, left, (right - high.float()).to(high.dtype), add=True)
    elif left.dtype == right.dtype == out.dtype:
        torch.addmm(out, left, right, beta=1.0 if add else 0.0, out=out)
    elif out.device.type == "cuda":
        if add:
            torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=1.0 if add else 0.0, out=out)
