"""dL/dlogits of hidden rows under an LM head, a slab of the vocabulary at a time, in the dtype of the products.

Grid: blocks of rows x tiles of the slab, one axis. A program recomputes one tile of logits, turns it into its
gradient in float32 (p − onehot, weighted by each slot's gradient, with the terms of log-sum-exp and entropy and the
slope of the softcap) and rounds it once into `slab` [R, columns]. cuBLAS does the rest (`launches.py`). With a bias
or a filter it also writes each column's sum, or largest absolute value, over its rows: one partial per row block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuna_kernels.gpu import launch
from tuna_kernels.gpu.static_case import Config, StaticCase
from tuna_kernels.head.slots import Slots
from tuna_kernels.head.tiled import Inputs, LinearHead, RowGradient
from tuna_kernels.head.triton.forward import NAMES, head_case, head_table
from tuna_kernels.head.triton.products import in_kernel
from tuna_kernels.head.triton.tiles import add_product, program_tile, row_slots, to_gradient, to_v


@triton.jit
def gradient_kernel(
    hidden,  # [T, width]
    weight,  # [V, width]
    bias,  # [V] or None
    low_hidden,  # [T, rank] or None
    low_weight,  # [V, rank] or None
    rows,  # [R] int64: row of hidden
    offsets,  # [R + 1] int64
    targets,  # [S] int64
    row_maximum,  # [R] of v
    log_sum,  # [R] log2
    softmax_weight,  # [R]
    entropy_weight,  # [R] or None
    entropy,  # [R] or None
    slot_gradient,  # [S]
    slab,  # [R, last_column - first_column] out
    column_sums,  # [row blocks, columns] out or None
    column_peaks,  # [row blocks, columns] out or None
    factor,  # [1] the slab holds the gradient times this, or None
    row_count,
    vocabulary,
    width,
    rank,
    hidden_stride,
    weight_stride,
    low_hidden_stride,
    low_weight_stride,
    slab_stride,
    scale,
    cap,
    first_column,
    last_column,
    CAPPED: tl.constexpr,
    TYPE: tl.constexpr,
    LOW_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block, tile = program_tile(row_count, tl.cdiv(last_column - first_column, BLOCK_N), BLOCK_M, GROUP_M)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < row_count
    source = tl.load(rows + row, mask=live, other=0)
    first = first_column + tile * BLOCK_N
    column = tl.arange(0, BLOCK_N)
    count = tl.minimum(last_column - first, BLOCK_N).to(tl.int32)
    entries = tl.minimum(first + column, vocabulary - 1).to(tl.int64)
    x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x = add_product(
        x, hidden, source, hidden_stride, weight, entries, weight_stride, width, BLOCK_K, EVEN, TYPE, PRECISION
    )
    if low_hidden is not None:
        x = add_product(
            x, low_hidden, source, low_hidden_stride, low_weight, entries, low_weight_stride, rank, 16, False,
            LOW_TYPE, PRECISION,
        )  # fmt: skip
    v = to_v(x, bias, first, column, count, scale, cap, CAPPED)
    row_top = tl.load(row_maximum + row, mask=live, other=0.0)
    row_log_sum = tl.load(log_sum + row, mask=live, other=0.0)
    row_weight = tl.load(softmax_weight + row, mask=live, other=0.0)
    row_entropy_weight = row_weight
    row_entropy = row_weight
    if entropy_weight is not None:
        row_entropy_weight = tl.load(entropy_weight + row, mask=live, other=0.0)
        row_entropy = tl.load(entropy + row, mask=live, other=0.0)
    first_slot, slots, most_slots = row_slots(offsets, row, row_count)
    d = to_gradient(
        v, first, column, count, row_top, row_log_sum, row_weight, row_entropy_weight, row_entropy, slot_gradient,
        targets, first_slot, slots, most_slots, scale, cap, CAPPED, entropy_weight is not None,
    )  # fmt: skip
    inside = column < count
    at = tile * BLOCK_N + column
    stored = d
    if factor is not None:
        stored = d * tl.load(factor)
    there = live[:, None] & inside[None, :]
    tl.store(slab + row[:, None] * slab_stride + at[None, :], stored.to(slab.dtype.element_ty), mask=there)
    partial = block * (last_column - first_column) + at
    if column_sums is not None:
        tl.store(column_sums + partial, tl.sum(tl.where(live[:, None], d, 0.0), 0), mask=inside)
    if column_peaks is not None:
        tl.store(column_peaks + partial, tl.max(tl.where(live[:, None], tl.abs(d), 0.0), 0), mask=inside)


def launch_gradient(
    inputs: Inputs,
    head: LinearHead,
    slots: Slots,
    gradient: RowGradient,
    slab: Tensor,
    first: int,
    *,
    factor: Tensor | None,
    want_sums: bool,
    want_peaks: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill `slab` [R, C] with dL/d(product) of vocabulary entries `first … first + C`, times `factor`.

    `gradient.log_sum` is in base 2 here. Returns each column's sum and largest absolute value, [C] float32; None if
    not requested.
    """
    hidden, weight, low, low_weight = inputs.hidden, head.weight, inputs.low_rank, head.low_rank_weight
    rows, columns = slab.shape
    vocabulary, width = weight.shape
    device = launch.device_of(hidden)
    products = in_kernel(inputs, head)

    def run(config: Config) -> tuple[Tensor | None, Tensor | None]:
        blocks = triton.cdiv(rows, config.blocks["BLOCK_M"])
        sums, peaks = (torch.empty(blocks, columns, device=slab.device) if w else None for w in (want_sums, want_peaks))
        gradient_kernel[(blocks * triton.cdiv(columns, config.blocks["BLOCK_N"]),)](
            hidden,
            weight,
            head.bias,
            low,
            low_weight,
            slots.rows,
            slots.offsets,
            slots.targets,
            gradient.maximum,
            gradient.log_sum,
            gradient.softmax_weight,
            gradient.entropy_weight,
            gradient.entropy,
            gradient.slot_gradient,
            slab,
            sums,
            peaks,
            factor,
            rows,
            vocabulary,
            width,
            0 if low is None else low.shape[1],
            hidden.stride(0),
            weight.stride(0),
            0 if low is None else low.stride(0),
            0 if low_weight is None else low_weight.stride(0),
            slab.stride(0),
            head.logit_scale,
            head.softcap or 0.0,
            first,
            first + columns,
            CAPPED=head.softcap is not None,
            **products._asdict(),
            EVEN=width % config.blocks["BLOCK_K"] == 0,
            **config.blocks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return None if sums is None else sums.sum(0), None if peaks is None else peaks.amax(0)

    key = (hidden.dtype, weight.dtype, launch.bucket(width), launch.bucket(columns), low is not None)
    table = head_table(inputs, head, want_entropy=gradient.entropy_weight is not None)
    return run(launch.choose("head_gradient", table, device, key, run))


def _cases() -> Iterator[StaticCase]:
    for element in NAMES:
        for plain in (True, False):
            inputs = ("row_maximum", "log_sum", "softmax_weight", "slot_gradient")
            extra = dict.fromkeys(inputs, "*fp32") | {"slab": f"*{element}"}
            extra |= {"slab_stride": "i32", "first_column": "i32", "last_column": "i32"}
            optional = ("entropy_weight", "entropy", "column_sums", "column_peaks", "factor")
            constants = dict.fromkeys(optional) if plain else {}
            extra |= {} if plain else dict.fromkeys(optional, "*fp32")
            name = "head_gradient" if plain else "head_gradient entropy filter"
            yield head_case(name, gradient_kernel, element, extra, constants, plain=plain)


STATIC = tuple(_cases())
