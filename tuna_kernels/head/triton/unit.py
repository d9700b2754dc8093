"""Gradient of hidden rows from their unit gradients: no logits, one row of the head for each slot.

Grid: rows x blocks of the width, one axis. A program owns one block of one row's gradient,
`softmax_weight * unit + sum over the row's slots of slot_gradient * w_target`, added in the order of the slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuna_kernels.gpu.static_case import ARCHITECTURES, Config, StaticCase
from tuna_kernels.head.slots import Slots
from tuna_kernels.head.tiled import RowGradient


@triton.jit
def unit_kernel(
    unit,  # [·, width] float32
    places,  # [R] int64: row of unit
    weight,  # [V, width]
    offsets,  # [R + 1] int64
    targets,  # [S] int64
    softmax_weight,  # [R]
    slot_gradient,  # [S]
    out,  # [R, width] float32
    width,
    vocabulary,
    unit_stride,
    weight_stride,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    row = pid // blocks
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    start = tl.load(offsets + row)
    stop = tl.load(offsets + row + 1)
    row_weight = tl.load(softmax_weight + row)
    sum = tl.load(unit + tl.load(places + row) * unit_stride + at, mask=inside, other=0.0)
    sum = tl.where(row_weight == 0, 0.0, sum * row_weight)  # without any probability the unit gradient is NaN
    for slot in range(start, stop):
        target = tl.load(targets + slot)
        known = (target >= 0) & (target < vocabulary)
        entry = tl.load(weight + target * weight_stride + at, mask=inside & known, other=0.0)
        sum += tl.load(slot_gradient + slot) * entry.to(tl.float32)
    tl.store(out + row * width + at, sum, mask=inside)


CONFIG = Config({"BLOCK": 1024}, num_warps=4)


def unit_rows(weight: Tensor, slots: Slots, unit: Tensor, places: Tensor, gradient: RowGradient) -> Tensor:
    """As `tiled.unit_rows`: [R, D] float32."""
    rows, (vocabulary, width) = slots.rows.numel(), weight.shape
    out = torch.empty(rows, width, dtype=unit.dtype, device=unit.device)
    if rows:
        unit_kernel[(rows * triton.cdiv(width, CONFIG.blocks["BLOCK"]),)](
            unit,
            places,
            weight,
            slots.offsets,
            slots.targets,
            gradient.softmax_weight,
            gradient.slot_gradient,
            out,
            width,
            vocabulary,
            unit.stride(0),
            weight.stride(0),
            **CONFIG.blocks,
            num_warps=CONFIG.num_warps,
        )
    return out


STATIC = (
    StaticCase(
        name="unit_rows bf16",
        kernel=lambda: unit_kernel,
        signature={"unit": "*fp32", "places": "*i64", "weight": "*bf16", "offsets": "*i64", "targets": "*i64"}
        | dict.fromkeys(("softmax_weight", "slot_gradient", "out"), "*fp32")
        | dict.fromkeys(("width", "vocabulary", "unit_stride", "weight_stride"), "i32"),
        configs=dict.fromkeys(ARCHITECTURES, (CONFIG,)),
        aligned=("unit", "weight", "out", "width", "unit_stride", "weight_stride"),
    ),
)
