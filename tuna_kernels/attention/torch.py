"""Attention over a packed tree, block by block, in torch operations on any device.

The plan (`block_plan`) gives the keys of each block, a route (`blocks`) computes the block. Only q, k, v, out and
lse are kept for the backward; keys and values are gathered run by run and never kept.
Half-precision blocks are converted to float32 (on CPUs without bfloat16 units bfloat16 products are several times
slower, and the softmax needs float32 anyway), and dK and dV are summed in float32. The runs of a block do not
overlap, so the sums need no atomics and are reproducible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuna_kernels.arguments import compute_dtype
from tuna_kernels.attention.block_plan import Block, BlockPlan, plan_for
from tuna_kernels.attention.blocks import BlockBackward, choose
from tuna_kernels.attention.call import AttentionCall, AttentionGradients, AttentionResult


def forward(call: AttentionCall) -> AttentionResult:
    """See `tuna_kernels.attention.ops`."""
    plan, k, v = _plan_of(call), call.k, call.v
    route = choose(call.q, v, call.softcap)
    out, lse = call.empty_result()
    q = _sorted(call.q, plan)
    for block in plan.blocks:
        queries, keys, values = _fold(q, block, k.shape[1]), _gather(k, block), _gather(v, block)
        block_out, block_lse = route.forward(queries, keys, values, block, call.scale, call.softcap)
        _put(out, block_out, block)
        _put(lse.unsqueeze(-1), block_lse.unsqueeze(-1), block)
    return AttentionResult(_unsorted(out, plan), _unsorted(lse, plan))


def backward(
    call: AttentionCall, result: AttentionResult, grad_out: Tensor, grad_lse: Tensor | None
) -> AttentionGradients:
    """See `tuna_kernels.attention.ops`."""
    plan, k, v = _plan_of(call), call.k, call.v
    route = choose(call.q, v, call.softcap, grad_lse)
    dtype, heads = compute_dtype(call.q.dtype), k.shape[1]
    dq = torch.empty_like(call.q)
    dk = torch.zeros_like(k, dtype=dtype)
    dv = torch.zeros_like(v, dtype=dtype)
    q, out, lse, grad_out = (_sorted(x, plan) for x in (call.q, *result, grad_out))
    grad_lse = None if grad_lse is None else _sorted(grad_lse, plan)
    for block in plan.blocks:
        given = BlockBackward(
            grad_out=_fold(grad_out, block, heads),
            out=_fold(out, block, heads),
            lse=_fold(lse.unsqueeze(-1), block, heads).squeeze(-1),
            grad_lse=None if grad_lse is None else _fold(grad_lse.unsqueeze(-1), block, heads).squeeze(-1),
        )
        queries, keys, values = _fold(q, block, heads), _gather(k, block), _gather(v, block)
        block_dq, block_dk, block_dv = route.backward(given, queries, keys, values, block, call.scale, call.softcap)
        _put(dq, block_dq, block)
        _scatter_add(dk, block_dk, block)
        _scatter_add(dv, block_dv, block)
    return AttentionGradients(_unsorted(dq, plan), dk.to(k.dtype), dv.to(v.dtype))


def _plan_of(call: AttentionCall) -> BlockPlan:
    return plan_for(call.subtree_end, call.query_rows, call.position_ids, call.window, call.q.device)


def _fold(x: Tensor, block: Block, heads: int) -> Tensor:
    """The block's part of x [B, Hq, Tq, d] as [B, Hkv, G·bq, d] in the compute dtype."""
    part = x[:, :, block.start : block.stop].to(compute_dtype(x.dtype))
    batch, all_heads, rows, size = part.shape
    return part.reshape(batch, heads, all_heads // heads * rows, size)


def _put(total: Tensor, part: Tensor, block: Block) -> None:
    """Write the block's [B, Hkv, G·bq, d] to its rows of `total` [B, Hq, Tq, d]."""
    rows = total[:, :, block.start : block.stop]
    rows.copy_(part.reshape(rows.shape))


def _gather(x: Tensor, block: Block) -> Tensor:
    """The block's keys or values [B, Hkv, nk, d] in the compute dtype."""
    parts = [x[:, :, start:stop] for start, stop in block.keys]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return joined.to(compute_dtype(x.dtype))


def _scatter_add(total: Tensor, part: Tensor, block: Block) -> None:
    """Add [B, Hkv, nk, d] to the block's runs of `total` [B, Hkv, T, d]."""
    done = 0
    for start, stop in block.keys:
        total[:, :, start:stop] += part[:, :, done : done + stop - start]
        done += stop - start


def _sorted(x: Tensor, plan: BlockPlan) -> Tensor:
    return x if plan.order is None else x.index_select(2, plan.order)


def _unsorted(x: Tensor, plan: BlockPlan) -> Tensor:
    """Back to the caller's order of queries."""
    if plan.order is None:
        return x
    result = torch.empty_like(x)
    result[:, :, plan.order] = x
    return result
