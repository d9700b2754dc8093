"""Device functions used by kernels of more than one op. Imports triton."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tuna_kernels.gpu import launch
from tuna_kernels.gpu.availability import is_interpreted

LOG2_E = tl.constexpr(launch.LOG2_E)
LN_2 = tl.constexpr(math.log(2))
INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def dot(a, b, accumulator, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator (None: 0) + a @ b, both rounded to TYPE, summed in float32; PRECISION: how float32 is multiplied.

    Triton's interpreter stores bfloat16 as integers and would multiply those, so it multiplies the rounded values in
    float32, which gives the same products.
    """
    a, b = a.to(TYPE), b.to(TYPE)
    if INTERPRETED and tl.bfloat16 == TYPE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """tanh to 2 units in the last place: a ratio of exponentials; near 0, where that cancels, the odd series."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    ratio = (1 - e) / (1 + e)
    s = x * x
    series = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * (1382 / 155925)))))
    return tl.where(s < 0.09, x * series, tl.where(x < 0, -ratio, ratio))
