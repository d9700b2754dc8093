"""Shared by the kernels of tree attention: loading tiles, scores in base 2, the visibility rule."""

from __future__ import annotations

import triton
import triton.language as tl

from tuna_kernels.gpu.device_math import tanh


@triton.jit
def load_rows(
    base,  # pointer to one head's rows
    rows,  # [R] which rows
    columns,  # [C] arange of the padded head size
    stride_row,
    here,  # [R] bool, rows that exist; used if MASKED
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Tile [R, C], zero beyond the head size and in nonexistent rows. Offsets are 64-bit."""
    pointers = base + rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    if MASKED and SIZE != PADDED:
        return tl.load(pointers, mask=here[:, None] & (columns < SIZE)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=here[:, None], other=0.0)
    if SIZE != PADDED:
        return tl.load(pointers, mask=(columns < SIZE)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def base2_scores(products, scale, cap, SOFTCAP: tl.constexpr):
    """log2(e) times the scores: products * scale, or cap * tanh(products * scale); the host folds log2(e) in."""
    if SOFTCAP:
        return cap * tanh(products * scale)
    return products * scale


@triton.jit
def visible(rows, columns, end, row_depth, column_depth, window, WINDOW: tl.constexpr):
    """Whether row i sees row j: j <= i < subtree_end[j] and, with a window, 0 <= depth_i - depth_j < window.

    Arguments broadcast. A nonexistent row is -1 and sees nothing; a nonexistent key has end 0.
    """
    seen = (columns <= rows) & (rows < end)
    if WINDOW:
        distance = row_depth - column_depth
        seen = seen & (distance >= 0) & (distance < window)
    return seen


@triton.jit
def query_block(
    block, rows_ptr, order_ptr, depth_ptr, Tq, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr
):
    """(slots, rows, depth) [BLOCK_M] of a query block: a query's index in memory, its packed row (-1 beyond the last
    query) and its depth."""
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = slots < Tq
    rows = tl.where(here, slots, -1)
    if ROWS:
        rows = tl.load(rows_ptr + slots, mask=here, other=-1)
        slots = tl.load(order_ptr + slots, mask=here, other=0)
    depth = rows
    if WINDOW:
        depth = tl.load(depth_ptr + rows, mask=here, other=0)
    return slots, rows, depth


@triton.jit
def key_block(block, end_ptr, depth_ptr, T, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """(columns, here, end, depth) [BLOCK_N] of a key block; end is 0 beyond the last key."""
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    here = columns < T
    end = tl.load(end_ptr + columns, mask=here, other=0)
    depth = columns
    if WINDOW:
        depth = tl.load(depth_ptr + columns, mask=here, other=0)
    return columns, here, end, depth
