"""Functions that kernels of more than one op call on the device. Imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """2 units in the last place: a ratio of exponentials, and near 0, where that cancels, the odd series."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    ratio = (1 - e) / (1 + e)
    s = x * x
    series = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * (1382 / 155925)))))
    return tl.where(s < 0.09, x * series, tl.where(x < 0, -ratio, ratio))
