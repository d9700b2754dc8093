"""Tree attention, backward: one kernel for dQ, one for dK and dV. No atomics; every sum has a fixed order.

    P = 2^(s - lse)    dP = dO Vᵀ    dS = P ∘ (dP - delta) ∘ softcap'    delta = rowsum(dO ∘ O) - dlse
    dQ = scale dS K    dK = scale dSᵀ Q    dV = Pᵀ dO

`dq_kernel`, grid (query blocks, Hq, B): owns the dQ of its queries and writes their delta, for the other kernel.

`dkv_kernel`, grid (key blocks, B Hkv, splits): owns dK and dV of its keys, or the summands of one split of them. It
iterates over the query heads of its group, and for each over the list of query blocks that see it. Prompts are
seen by all candidates below them, so their lists are long: with several splits each processes an equal part of the list
and writes its slice of a workspace [splits, B, Hkv, T, size], which the host adds in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tuna_kernels.attention.triton.tiles import base2_scores, key_block, load_rows, query_block, visible
from tuna_kernels.gpu.device_math import LOG2_E, dot


@triton.jit
def _score_gradient(s, p, dp, delta, cap, SOFTCAP: tl.constexpr):
    """Gradient of the uncapped, scaled scores; s are base-2 scores, bounded by cap."""
    ds = p * (dp - delta)
    if SOFTCAP:
        slope = s / cap
        ds = ds * (1 - slope * slope)
    return ds


@triton.jit
def _walk_keys(
    dq,  # [BLOCK_M, PAD_D] float32
    q,  # [BLOCK_M, PAD_D]
    grad_out,  # [BLOCK_M, PAD_V]
    lse,  # [BLOCK_M] float32, base 2
    delta,  # [BLOCK_M] float32
    rows,  # [BLOCK_M]
    row_depth,  # [BLOCK_M]
    k_base,
    v_base,
    end_ptr,
    depth_ptr,
    list_ptr,
    first,
    last,
    T,
    k_stride_row,
    v_stride_row,
    window,
    product_scale,
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
    TYPE: tl.constexpr = k_base.dtype.element_ty
    for step in range(first, last):
        block = tl.load(list_ptr + step)
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        here = columns < T
        k = load_rows(k_base, columns, tl.arange(0, PAD_D), k_stride_row, here, D, PAD_D, MASKED)
        v = load_rows(v_base, columns, tl.arange(0, PAD_V), v_stride_row, here, DV, PAD_V, MASKED)
        s = base2_scores(dot(q, tl.trans(k), None, TYPE, PRECISION), product_scale, cap, SOFTCAP)
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            columns, here, end, depth = key_block(block, end_ptr, depth_ptr, T, BLOCK_N, WINDOW)
            seen = visible(
                rows[:, None], columns[None, :], end[None, :], row_depth[:, None], depth[None, :], window, WINDOW
            )
            p = tl.where(seen, p, 0.0)
        dp = dot(grad_out, tl.trans(v), None, TYPE, PRECISION)
        ds = _score_gradient(s, p, dp, delta[:, None], cap, SOFTCAP)
        dq += dot(ds, k, None, TYPE, PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q_ptr,  # [B, Hq, Tq, D]
    k_ptr,  # [B, Hkv, T, D]
    v_ptr,  # [B, Hkv, T, DV]
    out_ptr,  # [B, Hq, Tq, DV]
    grad_out_ptr,  # [B, Hq, Tq, DV]
    dq_ptr,  # [B, Hq, Tq, D]
    lse_ptr,  # [B, Hq, Tq] float32, contiguous, as the next two
    grad_lse_ptr,  # used with GRAD_LSE
    delta_ptr,  # written
    end_ptr,
    rows_ptr,
    order_ptr,
    depth_ptr,
    list_ptr,  # [query blocks, list_width] int32: key blocks, full ones first
    full_ptr,  # [query blocks] int32
    live_ptr,  # [query blocks] int32
    Tq,
    T,
    group,
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
    grad_out_stride_batch,
    grad_out_stride_head,
    grad_out_stride_row,
    dq_stride_batch,
    dq_stride_head,
    dq_stride_row,
    product_scale,
    cap,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRAD_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // group
    slots, rows, row_depth = query_block(block, rows_ptr, order_ptr, depth_ptr, Tq, BLOCK_M, ROWS, WINDOW)
    here = rows >= 0
    columns = tl.arange(0, PAD_D)
    values = tl.arange(0, PAD_V)
    q_base = q_ptr + batch * q_stride_batch + head * q_stride_head
    k_base = k_ptr + batch * k_stride_batch + kv_head * k_stride_head
    v_base = v_ptr + batch * v_stride_batch + kv_head * v_stride_head
    out_base = out_ptr + batch * out_stride_batch + head * out_stride_head
    grad_base = grad_out_ptr + batch * grad_out_stride_batch + head * grad_out_stride_head
    out = load_rows(out_base, slots, values, out_stride_row, here, DV, PAD_V, True)
    grad_out = load_rows(grad_base, slots, values, grad_out_stride_row, here, DV, PAD_V, True)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    of_row = (batch * tl.num_programs(1) + head) * Tq + slots
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + of_row, mask=here, other=0.0)
    tl.store(delta_ptr + of_row, delta, mask=here)
    lse = tl.load(lse_ptr + of_row, mask=here, other=0.0) * LOG2_E
    q = load_rows(q_base, slots, columns, q_stride_row, here, D, PAD_D, True)
    dq = tl.zeros([BLOCK_M, PAD_D], tl.float32)
    blocks_ptr = list_ptr + block.to(tl.int64) * list_width
    full = tl.load(full_ptr + block)
    live = tl.load(live_ptr + block)
    for masked in tl.static_range(2):
        dq = _walk_keys(
            dq, q, grad_out, lse, delta, rows, row_depth, k_base, v_base, end_ptr, depth_ptr, blocks_ptr,
            full if masked else 0, live if masked else full, T, k_stride_row, v_stride_row, window, product_scale, cap,
            D, DV, PAD_D, PAD_V, BLOCK_N, WINDOW, SOFTCAP, PRECISION, masked == 1,
        )  # fmt: skip
    dq_base = dq_ptr + batch * dq_stride_batch + head * dq_stride_head
    pointers = dq_base + slots.to(tl.int64)[:, None] * dq_stride_row + columns[None, :]
    tl.store(pointers, (dq * scale).to(dq_ptr.dtype.element_ty), mask=here[:, None] & (columns < D)[None, :])


@triton.jit
def _walk_queries(
    dk,  # [BLOCK_N, PAD_D] float32
    dv,  # [BLOCK_N, PAD_V] float32
    k,  # [BLOCK_N, PAD_D]
    v,  # [BLOCK_N, PAD_V]
    columns,  # [BLOCK_N] packed rows of the keys
    end,  # [BLOCK_N]
    depth,  # [BLOCK_N]
    q_base,
    grad_base,
    lse_base,
    delta_base,
    rows_ptr,
    order_ptr,
    depth_ptr,
    list_ptr,
    first,
    last,
    Tq,
    q_stride_row,
    grad_out_stride_row,
    window,
    product_scale,
    cap,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Query blocks [first, last) of the list; tiles are [keys, queries]."""
    TYPE: tl.constexpr = q_base.dtype.element_ty
    size = tl.arange(0, PAD_D)
    values = tl.arange(0, PAD_V)
    for step in range(first, last):
        block = tl.load(list_ptr + step)
        slots, rows, row_depth = query_block(block, rows_ptr, order_ptr, depth_ptr, Tq, BLOCK_M, ROWS, WINDOW)
        here = rows >= 0
        q = load_rows(q_base, slots, size, q_stride_row, here, D, PAD_D, MASKED)
        grad_out = load_rows(grad_base, slots, values, grad_out_stride_row, here, DV, PAD_V, MASKED)
        lse = tl.load(lse_base + slots, mask=here, other=0.0) * LOG2_E
        delta = tl.load(delta_base + slots, mask=here, other=0.0)
        s = base2_scores(dot(k, tl.trans(q), None, TYPE, PRECISION), product_scale, cap, SOFTCAP)
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            seen = visible(
                rows[None, :], columns[:, None], end[:, None], row_depth[None, :], depth[:, None], window, WINDOW
            )
            p = tl.where(seen, p, 0.0)
        dv += dot(p, grad_out, None, TYPE, PRECISION)
        dp = dot(v, tl.trans(grad_out), None, TYPE, PRECISION)
        ds = _score_gradient(s, p, dp, delta[None, :], cap, SOFTCAP)
        dk += dot(ds, q, None, TYPE, PRECISION)
    return dk, dv


@triton.jit
def dkv_kernel(
    q_ptr,  # [B, Hq, Tq, D]
    k_ptr,  # [B, Hkv, T, D]
    v_ptr,  # [B, Hkv, T, DV]
    grad_out_ptr,  # [B, Hq, Tq, DV]
    dk_ptr,  # [splits, B, Hkv, T, D]
    dv_ptr,  # [splits, B, Hkv, T, DV]
    lse_ptr,  # [B, Hq, Tq] float32, contiguous, as delta
    delta_ptr,
    end_ptr,
    rows_ptr,
    order_ptr,
    depth_ptr,
    list_ptr,  # [key blocks, list_width] int32: query blocks, full ones first
    full_ptr,  # [key blocks] int32
    live_ptr,  # [key blocks] int32
    Tq,
    T,
    group,
    kv_heads,
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
    grad_out_stride_batch,
    grad_out_stride_head,
    grad_out_stride_row,
    dk_stride_split,
    dk_stride_batch,
    dk_stride_head,
    dk_stride_row,
    dv_stride_split,
    dv_stride_batch,
    dv_stride_head,
    dv_stride_row,
    product_scale,
    cap,
    scale,
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
    block = tl.program_id(0)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    split = tl.program_id(2)
    size = tl.arange(0, PAD_D)
    values = tl.arange(0, PAD_V)
    columns, here, end, depth = key_block(block, end_ptr, depth_ptr, T, BLOCK_N, WINDOW)
    k_base = k_ptr + batch * k_stride_batch + kv_head * k_stride_head
    v_base = v_ptr + batch * v_stride_batch + kv_head * v_stride_head
    k = load_rows(k_base, columns, size, k_stride_row, here, D, PAD_D, True)
    v = load_rows(v_base, columns, values, v_stride_row, here, DV, PAD_V, True)
    dk = tl.zeros([BLOCK_N, PAD_D], tl.float32)
    dv = tl.zeros([BLOCK_N, PAD_V], tl.float32)
    blocks_ptr = list_ptr + block.to(tl.int64) * list_width
    full = tl.load(full_ptr + block)
    live = tl.load(live_ptr + block)
    first = live * split // tl.num_programs(2)
    last = live * (split + 1) // tl.num_programs(2)
    for member in range(group):
        head = kv_head * group + member
        q_base = q_ptr + batch * q_stride_batch + head * q_stride_head
        grad_base = grad_out_ptr + batch * grad_out_stride_batch + head * grad_out_stride_head
        of_head = (batch * kv_heads * group + head) * Tq
        for masked in tl.static_range(2):
            dk, dv = _walk_queries(
                dk, dv, k, v, columns, end, depth, q_base, grad_base, lse_ptr + of_head, delta_ptr + of_head, rows_ptr,
                order_ptr, depth_ptr, blocks_ptr, tl.maximum(first, full) if masked else first,
                last if masked else tl.minimum(last, full), Tq, q_stride_row, grad_out_stride_row, window,
                product_scale, cap, D, DV, PAD_D, PAD_V, BLOCK_M, ROWS, WINDOW, SOFTCAP, PRECISION, masked == 1,
            )  # fmt: skip
    split = split.to(tl.int64)
    dk_base = dk_ptr + split * dk_stride_split + batch * dk_stride_batch + kv_head * dk_stride_head
    dv_base = dv_ptr + split * dv_stride_split + batch * dv_stride_batch + kv_head * dv_stride_head
    rows = columns.to(tl.int64)[:, None]
    dk_pointers = dk_base + rows * dk_stride_row + size[None, :]
    dv_pointers = dv_base + rows * dv_stride_row + values[None, :]
    tl.store(dk_pointers, (dk * scale).to(dk_ptr.dtype.element_ty), mask=here[:, None] & (size < D)[None, :])
    tl.store(dv_pointers, dv.to(dv_ptr.dtype.element_ty), mask=here[:, None] & (values < DV)[None, :])
