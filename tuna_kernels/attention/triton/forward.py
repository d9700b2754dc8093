"""Tree attention, forward.

Grid (query blocks, Hq, B); a program owns BLOCK_M queries of one head and writes their out and lse. It iterates over
its list of key blocks, fully visible ones first and without a mask, with an online softmax in base 2:

    top' = max(top, max_j s_j)    total' = total 2^(top - top') + sum_j 2^(s_j - top')    the same for the values

In a long chain the last query blocks see most keys, so they start first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tuna_kernels.attention.triton.tiles import base2_scores, key_block, load_rows, query_block, visible
from tuna_kernels.gpu.device_math import LN_2, dot


@triton.jit
def _walk(
    accumulator,  # [BLOCK_M, PAD_V] float32
    total,  # [BLOCK_M] float32
    top,  # [BLOCK_M] float32
    q,  # [BLOCK_M, PAD_D]
    rows,  # [BLOCK_M]
    row_depth,  # [BLOCK_M]
    k_base,
    v_base,
    end_ptr,
    depth_ptr,
    list_ptr,  # this query block's key blocks
    first,
    last,
    T,
    k_stride_row,
    v_stride_row,
    window,
    scale,
    cap,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Key blocks [first, last) of the list."""
    TYPE: tl.constexpr = k_base.dtype.element_ty
    for step in range(first, last):
        block = tl.load(list_ptr + step)
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        here = columns < T
        k = load_rows(k_base, columns, tl.arange(0, PAD_D), k_stride_row, here, D, PAD_D, MASKED)
        s = base2_scores(dot(q, tl.trans(k), None, TYPE, PRECISION), scale, cap, SOFTCAP)
        if MASKED:
            columns, here, end, depth = key_block(block, end_ptr, depth_ptr, T, BLOCK_N, WINDOW)
            seen = visible(
                rows[:, None], columns[None, :], end[None, :], row_depth[:, None], depth[None, :], window, WINDOW
            )
            s = tl.where(seen, s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = new_top
        if MASKED:  # a row may have seen nothing yet, and -inf - -inf is NaN
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.sum(p, 1)
        v = load_rows(v_base, columns, tl.arange(0, PAD_V), v_stride_row, here, DV, PAD_V, MASKED)
        accumulator = accumulator * rescale[:, None] + dot(p, v, None, TYPE, PRECISION)
        top = new_top
    return accumulator, total, top


@triton.jit
def forward_kernel(
    q_ptr,  # [B, Hq, Tq, D]
    k_ptr,  # [B, Hkv, T, D]
    v_ptr,  # [B, Hkv, T, DV]
    out_ptr,  # [B, Hq, Tq, DV]
    lse_ptr,  # [B, Hq, Tq] float32, contiguous
    end_ptr,  # [T] int32
    rows_ptr,  # [Tq] int32, with ROWS
    order_ptr,  # [Tq] int32, with ROWS
    depth_ptr,  # [T] int32, with WINDOW
    list_ptr,  # [query blocks, list_width] int32: key blocks, full ones first
    full_ptr,  # [query blocks] int32
    live_ptr,  # [query blocks] int32
    Tq,
    T,
    group,  # query heads per key head
    list_width,
    window,
    q_stride_batch,
    q_stride_head,
    q_stride_row,
    k_stride_batch,
    k_stride_head,
    k_stride_row,
    v_stride_batch,
    v_stride_head,
    v_stride_row,
    out_stride_batch,
    out_stride_head,
    out_stride_row,
    scale,
    cap,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // group
    slots, rows, row_depth = query_block(block, rows_ptr, order_ptr, depth_ptr, Tq, BLOCK_M, ROWS, WINDOW)
    here = rows >= 0
    q_base = q_ptr + batch * q_stride_batch + head * q_stride_head
    k_base = k_ptr + batch * k_stride_batch + kv_head * k_stride_head
    v_base = v_ptr + batch * v_stride_batch + kv_head * v_stride_head
    q = load_rows(q_base, slots, tl.arange(0, PAD_D), q_stride_row, here, D, PAD_D, True)
    accumulator = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    blocks_ptr = list_ptr + block.to(tl.int64) * list_width
    full = tl.load(full_ptr + block)
    live = tl.load(live_ptr + block)
    for masked in tl.static_range(2):
        accumulator, total, top = _walk(
            accumulator, total, top, q, rows, row_depth, k_base, v_base, end_ptr, depth_ptr, blocks_ptr,
            full if masked else 0, live if masked else full, T, k_stride_row, v_stride_row, window, scale, cap, D, DV,
            PAD_D, PAD_V, BLOCK_N, WINDOW, SOFTCAP, PRECISION, masked == 1,
        )  # fmt: skip
    total = tl.where(here, total, 1.0)  # an existing row that sees nothing keeps 0 and gives NaN
    out = accumulator / total[:, None]
    columns = tl.arange(0, PAD_V)
    out_base = out_ptr + batch * out_stride_batch + head * out_stride_head
    pointers = out_base + slots.to(tl.int64)[:, None] * out_stride_row + columns[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=here[:, None] & (columns < DV)[None, :])
    lse = (top + tl.log2(total)) * LN_2
    tl.store(lse_ptr + (batch * tl.num_programs(1) + head) * Tq + slots, lse, mask=here)
