"""Softmax and gradient of existing logits: one read in each direction, and one write of the gradient.

Used by `selective_logprobs`, by a ranking loss that keeps a block of logits, and by the unit gradient of a frozen
head. Grid: blocks of rows x splits (forward) or tiles (gradient) of the columns, one axis. The forward's partials are
those of `forward.py`, merged by the same kernel; the splits depend on the number of columns only, so a row's bits do
not depend on the batch. The gradient may overwrite the logits: each element is read and written by one thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuna_kernels.gpu import launch
from tuna_kernels.gpu.static_case import ARCHITECTURES, Config, StaticCase
from tuna_kernels.head.tiled import LinearHead, RowGradient
from tuna_kernels.head.triton.tiles import (
    merge_softmax,
    program_tile,
    rate_of,
    row_slots,
    store_target_logit,
    to_gradient,
    to_v,
)

TILES_PER_SPLIT = 8


@triton.jit
def logits_forward_kernel(
    logits,  # [·, columns]
    bias,  # [V] or None
    offsets,  # [R + 1] int64, or None: row r has slot r, ignored if its target is ignore_index
    targets,  # [S] int64
    maximum,  # [splits, R] float32 out, of v
    total,  # [splits, R] out
    weighted,  # [splits, R] out or None
    target_logit,  # [S] out, v
    row_count,
    column_count,
    first_column,  # vocabulary entry of column 0
    logits_stride,
    ignore_index,
    scale,
    cap,
    splits,
    CAPPED: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, split = program_tile(row_count, splits, BLOCK_M, 1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < row_count
    first_slot, slots, most_slots = row_slots(offsets, row, row_count)
    read = live
    if offsets is None:
        read = live & (tl.load(targets + row, mask=live, other=0) != ignore_index)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    t = tl.zeros([BLOCK_M], tl.float32)
    column = tl.arange(0, BLOCK_N)
    start = split * TILES
    for tile in range(start, tl.minimum(start + TILES, tl.cdiv(column_count, BLOCK_N))):
        first = tile * BLOCK_N
        count = tl.minimum(column_count - first, BLOCK_N).to(tl.int32)
        there = read[:, None] & (column < count)[None, :]
        x = tl.load(logits + row[:, None] * logits_stride + (first + column)[None, :], mask=there, other=0.0)
        entry = first_column + first
        v = to_v(x.to(tl.float32), bias, entry, column, count, scale, cap, CAPPED)
        store_target_logit(v, entry, column, count, target_logit, targets, first_slot, slots, most_slots)
        m, s, t = merge_softmax(v, m, s, t, rate_of(scale, CAPPED), weighted is not None)
    at = split * row_count + row
    tl.store(maximum + at, m, mask=live)
    tl.store(total + at, s, mask=live)
    if weighted is not None:
        tl.store(weighted + at, t, mask=live)


@triton.jit
def logits_gradient_kernel(
    logits,  # [·, columns]
    rows,  # [R] int64: row of logits, or None: r
    bias,  # [V] or None
    offsets,  # [R + 1] int64 or None, as in the forward
    targets,  # [S] int64
    row_maximum,  # [R] of v
    log_sum,  # [R] log2
    softmax_weight,  # [R]
    slot_gradient,  # [S] or None
    out,  # [R, columns]; may be logits
    column_sums,  # [row blocks, columns] out or None
    factor,  # [1] or None: out holds the gradient times this
    row_count,
    column_count,
    first_column,
    logits_stride,
    out_stride,
    ignore_index,
    scale,
    cap,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, tile = program_tile(row_count, tl.cdiv(column_count, BLOCK_N), BLOCK_M, 1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < row_count
    first_slot, slots, most_slots = row_slots(offsets, row, row_count)
    read = live
    if offsets is None:
        read = live & (tl.load(targets + row, mask=live, other=0) != ignore_index)
    source = row
    if rows is not None:
        source = tl.load(rows + row, mask=live, other=0)
    row_top = tl.load(row_maximum + row, mask=live, other=0.0)
    row_log_sum = tl.load(log_sum + row, mask=live, other=0.0)
    row_weight = tl.load(softmax_weight + row, mask=live, other=0.0)
    first = tile * BLOCK_N
    column = tl.arange(0, BLOCK_N)
    count = tl.minimum(column_count - first, BLOCK_N).to(tl.int32)
    inside = column < count
    x = tl.load(
        logits + source[:, None] * logits_stride + (first + column)[None, :],
        mask=read[:, None] & inside[None, :],
        other=0.0,
    )
    entry = first_column + first
    v = to_v(x.to(tl.float32), bias, entry, column, count, scale, cap, CAPPED)
    d = to_gradient(
        v, entry, column, count, row_top, row_log_sum, row_weight, row_weight, row_weight, slot_gradient, targets,
        first_slot, slots, most_slots, scale, cap, CAPPED, False,
    )  # fmt: skip
    d = tl.where(read[:, None], d, 0.0)
    stored = d
    if factor is not None:
        stored = d * tl.load(factor)
    at = out + row[:, None] * out_stride + (first + column)[None, :]
    tl.store(at, stored.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])
    if column_sums is not None:
        tl.store(column_sums + block * column_count + first + column, tl.sum(d, 0), mask=inside)


# Bandwidth is the bottleneck: 8 elements per thread, in few enough registers for at least half of all threads to be
# resident. The gradient uses several rows per program, as its column sums are one partial per row block.
_INTERPRETED = Config({"BLOCK_M": 16, "BLOCK_N": 32})
FORWARD: launch.Table = {
    launch.INTERPRETER: (_INTERPRETED,),
    80: (Config({"BLOCK_M": 1, "BLOCK_N": 1024}, num_warps=4),),
}
GRADIENT: launch.Table = {
    launch.INTERPRETER: (_INTERPRETED,),
    80: (Config({"BLOCK_M": 4, "BLOCK_N": 512}, num_warps=8),),
}


def _config(table: launch.Table, logits: Tensor) -> Config:
    return launch.candidates(table, launch.device_of(logits).capability)[0]


def splits_of(logits: Tensor) -> int:
    """Number of partials per row in `launch_logits_forward`."""
    return int(triton.cdiv(logits.shape[1], _config(FORWARD, logits).blocks["BLOCK_N"] * TILES_PER_SPLIT))


def launch_logits_forward(
    logits: Tensor,
    head: LinearHead,
    targets: Tensor,
    offsets: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    weighted: Tensor | None,
    target_logit: Tensor,
    *,
    first: int = 0,
    ignore_index: int = -1,
) -> None:
    """Partials [splits, R] of `logits` [R, C], which are vocabulary entries `first … first + C`.

    `offsets` None: row r has slot r, unless its target is `ignore_index`.
    """
    config, (rows, columns) = _config(FORWARD, logits), logits.shape
    logits_forward_kernel[(triton.cdiv(rows, config.blocks["BLOCK_M"]) * splits_of(logits),)](
        logits,
        head.bias,
        offsets,
        targets,
        maximum,
        total,
        weighted,
        target_logit,
        rows,
        columns,
        first,
        logits.stride(0),
        ignore_index,
        head.logit_scale,
        head.softcap or 0.0,
        splits_of(logits),
        CAPPED=head.softcap is not None,
        TILES=TILES_PER_SPLIT,
        **config.blocks,
        num_warps=config.num_warps,
    )


def launch_logits_gradient(
    logits: Tensor,
    head: LinearHead,
    targets: Tensor,
    offsets: Tensor | None,
    gradient: RowGradient,
    out: Tensor,
    *,
    rows: Tensor | None = None,
    first: int = 0,
    ignore_index: int = -1,
    factor: Tensor | None = None,
    want_sums: bool = False,
) -> Tensor | None:
    """Write dL/d(product) times `factor` to `out` [R, C]; returns each column's sum if requested.

    `gradient.log_sum` is in base 2 here. `rows` [R]: the row of `logits` for each row of `out`.
    """
    config, (count, columns) = _config(GRADIENT, logits), out.shape
    blocks = triton.cdiv(count, config.blocks["BLOCK_M"])
    sums = torch.empty(blocks, columns, device=out.device) if want_sums else None
    logits_gradient_kernel[(blocks * triton.cdiv(columns, config.blocks["BLOCK_N"]),)](
        logits,
        rows,
        head.bias,
        offsets,
        targets,
        gradient.maximum,
        gradient.log_sum,
        gradient.softmax_weight,
        gradient.slot_gradient if gradient.slot_gradient.numel() else None,
        out,
        sums,
        factor,
        count,
        columns,
        first,
        logits.stride(0),
        out.stride(0),
        ignore_index,
        head.logit_scale,
        head.softcap or 0.0,
        CAPPED=head.softcap is not None,
        **config.blocks,
        num_warps=config.num_warps,
    )
    return None if sums is None else sums.sum(0)


def _cases() -> Iterator[StaticCase]:
    sizes = dict.fromkeys(("row_count", "column_count", "first_column", "logits_stride"), "i32")
    sizes |= {"ignore_index": "i32", "scale": "fp32", "cap": "fp32"}
    for element in ("bf16", "fp16", "fp32"):
        for plain in (True, False):
            suffix = f"{element}{'' if plain else ' bias slots softcap'}"
            common = {"logits": f"*{element}", "targets": "*i64"} | sizes
            common |= {} if plain else {"bias": "*fp32", "offsets": "*i64"}
            absent: dict[str, object] = dict.fromkeys(("bias", "offsets")) if plain else {}
            outputs = dict.fromkeys(("maximum", "total", "target_logit"), "*fp32") | {"splits": "i32"}
            yield StaticCase(
                name=f"logits_forward {suffix}",
                kernel=lambda: logits_forward_kernel,
                signature=common | outputs | ({} if plain else {"weighted": "*fp32"}),
                configs=dict.fromkeys(ARCHITECTURES, FORWARD[80]),
                constants=absent
                | {"CAPPED": not plain, "TILES": TILES_PER_SPLIT}
                | ({"weighted": None} if plain else {}),
                aligned=("logits", "logits_stride"),
            )
            optional = dict.fromkeys(("column_sums", "factor"), "*fp32") | {"rows": "*i64"}
            inputs = dict.fromkeys(("row_maximum", "log_sum", "softmax_weight", "slot_gradient"), "*fp32")
            yield StaticCase(
                name=f"logits_gradient {suffix}",
                kernel=lambda: logits_gradient_kernel,
                signature=common | inputs | {"out": f"*{element}", "out_stride": "i32"} | ({} if plain else optional),
                configs=dict.fromkeys(ARCHITECTURES, GRADIENT[80]),
                constants=absent | {"CAPPED": not plain} | (dict.fromkeys(optional) if plain else {}),
                aligned=("logits", "logits_stride", "out", "out_stride"),
            )


STATIC = tuple(_cases())
