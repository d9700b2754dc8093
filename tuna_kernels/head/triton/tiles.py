"""Operations of the kernels on one tile: the product, from product to logits, the softmax, the gradient.

Statistics are in terms of v, where a logit is `z = factor * v` (`tiled.LinearHead`), and differences of v are taken
before multiplying by `rate = log2(e) * factor`: `e^(z - m) = 2^(rate (v - v_m))` is one instruction, unaffected by
the rounding of a large z or a fused multiply-add. Nothing here calls libdevice, which the interpreter does not have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tuna_kernels.gpu.device_math import LN_2, LOG2_E, dot, tanh


@triton.jit
def program_tile(row_count, column_blocks, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """(block of rows, block of columns) of a program in a 1-D grid: GROUP_M row blocks advance together, so that
    a weight tile is read from DRAM once for all of them and their hidden rows stay in L2."""
    pid = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(row_count, BLOCK_M)
    in_group = GROUP_M * column_blocks
    first = pid // in_group * GROUP_M
    size = tl.minimum(row_blocks - first, GROUP_M)
    within = pid % in_group
    return first + within % size, within // size


@triton.jit
def add_product(
    acc,  # [BLOCK_M, BLOCK_N] float32
    left,  # pointer to [·, width], rows `left_rows` of `left_stride` elements
    left_rows,  # [BLOCK_M] int64
    left_stride,
    right,  # pointer to [·, width]
    right_rows,  # [BLOCK_N] int64
    right_stride,
    width,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides width
    TYPE: tl.constexpr,  # both are converted to this
    PRECISION: tl.constexpr,  # how float32 is multiplied
):
    """`acc + left[left_rows] @ right[right_rows]^T`."""
    depth = tl.arange(0, BLOCK_K)
    a_at = left + left_rows[:, None] * left_stride + depth[None, :]
    b_at = right + right_rows[None, :] * right_stride + depth[:, None]
    for k in range(0, width, BLOCK_K):
        if EVEN:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            a = tl.load(a_at, mask=depth[None, :] < width - k, other=0.0)
            b = tl.load(b_at, mask=depth[:, None] < width - k, other=0.0)
        acc = dot(a, b, acc, TYPE, PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K
    return acc


@triton.jit
def rate_of(scale, CAPPED: tl.constexpr):
    """Base-2 logits per unit of v; never 0, so that −inf stays −inf."""
    if CAPPED:
        rate = LOG2_E
    else:
        rate = tl.maximum(tl.abs(scale), 1e-37) * LOG2_E
    return rate


@triton.jit
def to_v(x, bias, first, column, count, scale, cap, CAPPED: tl.constexpr):
    """v of products `x` [BLOCK_M, BLOCK_N] of vocabulary entries `first + column`.

    `column` is int32 within the tile, to save registers; columns from `count` on are beyond the vocabulary: −inf.
    """
    inside = column < count
    if bias is not None:
        x += tl.load(bias + first + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        v = tanh(x * (scale / cap)) * cap
    else:
        v = tl.where(scale < 0, -x, x)
    return tl.where(inside[None, :], v, float("-inf"))


@triton.jit
def merge_softmax(v, maximum, total, weighted, rate, WEIGHTED: tl.constexpr):
    """Merge a tile into the running (max v, sum 2^y, sum 2^y y) of each row, `y = rate (v - max v)`."""
    larger = tl.maximum(maximum, tl.max(v, 1))
    reference = tl.where(larger == float("-inf"), 0.0, larger)  # only -inf so far: sums stay 0, not NaN
    fall = (maximum - reference) * rate
    rescale = tl.exp2(fall)
    below = (v - reference[:, None]) * rate
    exponentials = tl.exp2(below)
    if WEIGHTED:
        moved = total * tl.maximum(fall, -1e4)
        # If 2^below is 0, below may be −inf; bounding it makes their product 0.
        weighted = (weighted + moved) * rescale + tl.sum(exponentials * tl.maximum(below, -1e4), 1)
    total = total * rescale + tl.sum(exponentials, 1)
    return larger, total, weighted


@triton.jit
def row_slots(offsets, rows, row_count):
    """(first slot, number of slots) of each row, int64, and the largest number. Without offsets row r has slot r."""
    live = rows < row_count
    if offsets is None:
        first = rows
        count = live.to(tl.int64)
    else:
        first = tl.load(offsets + rows, mask=live, other=0)
        count = tl.load(offsets + rows + 1, mask=live, other=0) - first
    return first, count, tl.max(count, 0)


@triton.jit
def target_column(targets, first_slot, slots, j, first, count):
    """Column within the tile, int32, of the target of each row's slot `j`; −1 if it is not in this tile."""
    target = tl.load(targets + first_slot + j, mask=j < slots, other=-1) - first
    return tl.where((target >= 0) & (target < count), target, -1).to(tl.int32)


@triton.jit
def store_target_logit(v, first, column, count, target_logit, targets, first_slot, slots, most_slots):
    """Write v of each slot whose target is in the tile: only one tile contains it, so there is one writer.

    `first_slot`, `slots`, `most_slots`: from `row_slots`.
    """
    for j in range(0, most_slots):
        target = target_column(targets, first_slot, slots, j, first, count)
        if tl.max(target, 0) >= 0:
            value = tl.sum(tl.where(column[None, :] == target[:, None], v, 0.0), 1)
            tl.store(target_logit + first_slot + j, value, mask=target >= 0)


@triton.jit
def to_gradient(
    v,  # [BLOCK_M, BLOCK_N]
    first,
    column,
    count,  # as in to_v
    maximum,  # [BLOCK_M] of v
    log_sum,  # [BLOCK_M] log2 of the sum relative to it
    softmax_weight,  # [BLOCK_M]
    entropy_weight,  # [BLOCK_M], read if WEIGHTED
    entropy,  # [BLOCK_M]
    slot_gradient,  # pointer [S] or None
    targets,
    first_slot,
    slots,
    most_slots,
    scale,
    cap,
    CAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """dL/d(product) in float32: the one-hot part is added before rounding."""
    log2_p = (v - maximum[:, None]) * rate_of(scale, CAPPED) - log_sum[:, None]
    p = tl.exp2(log2_p)
    if WEIGHTED:
        surprise = tl.maximum(log2_p, -1e4) * LN_2 + entropy[:, None]  # finite where p is 0
        d = p * (softmax_weight[:, None] - entropy_weight[:, None] * surprise)
    else:
        d = p * softmax_weight[:, None]
    if slot_gradient is not None:
        for j in range(0, most_slots):
            target = target_column(targets, first_slot, slots, j, first, count)
            if tl.max(target, 0) >= 0:
                g = tl.load(slot_gradient + first_slot + j, mask=target >= 0, other=0.0)
                d += tl.where(column[None, :] == target[:, None], g[:, None], 0.0)
    if CAPPED:
        ratio = v / cap
        d *= 1 - ratio * ratio
    d *= scale
    return d
