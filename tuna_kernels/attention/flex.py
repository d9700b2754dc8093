"""Tree attention through PyTorch's FlexAttention: a mask function, a score function and a block mask.

Compiled on CUDA, once for all lengths; on CPU it runs uncompiled, as the dense formula, forward only (PyTorch has no
backward there). Plain autograd: gradients of out and lse are FlexAttention's own. The block lists come from the same
bounds as those of the Triton kernels (`bounds`), without evaluating the T × T mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tuna_kernels.attention import reference
from tuna_kernels.attention.block_plan import check_values
from tuna_kernels.attention.bounds import BlockMap, block_map
from tuna_kernels.attention.call import AttentionCall, AttentionResult
from tuna_kernels.attention.sinks import beside_sinks

BLOCK = 128
"""FlexAttention's default block size, a multiple of all its kernels' tiles."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str:
    """ "" if these inputs are supported, else the reason why not."""
    if q.dtype not in DTYPES:
        return f"FlexAttention does not support {q.dtype}"
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active()
        or any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v))  # type: ignore[no-untyped-call]
    ):
        return 'FlexAttention supports neither forward mode nor transforms of torch.func; use backend="reference"'
    if q.device.type == "cuda":
        return ""
    if q.device.type != "cpu":
        return f"the inputs are on {q.device}, not on CUDA"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "FlexAttention has no backward on CPU; detach the inputs or use torch.no_grad()"
    return ""


def tree_attention(call: AttentionCall, sinks: Tensor | None = None) -> AttentionResult:
    """Attention by FlexAttention, with a float32 lse."""
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v, subtree_end, query_rows, position_ids, window, scale, softcap = call
    check_values(subtree_end, query_rows)
    if q.numel() == 0:
        return reference.tree_attention(call, sinks)
    if not torch.is_grad_enabled():  # on CPU it rejects inputs that require a gradient even under no_grad
        q, k, v = q.detach(), k.detach(), v.detach()
    blocks = block_map(subtree_end, query_rows, position_ids, window)
    if blocks.order is not None:
        q = q.index_select(2, blocks.order)
    out, aux = _flex(q.device.type)(
        q,
        k,
        v,
        score_mod=None if softcap is None else _softcap(softcap),
        block_mask=block_mask(blocks),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    lse: Tensor = aux.lse
    if blocks.order is not None:
        back = torch.argsort(blocks.order)
        out, lse = out.index_select(2, back), lse.index_select(2, back)
    if sinks is not None:
        share, lse = beside_sinks(lse, sinks)
        out = (out * share).to(out.dtype)
    return AttentionResult(out, lse)


def block_mask(blocks: BlockMap) -> Any:
    """The `BlockMask` of a tree, built once and cached with its map."""
    from torch.nn.attention.flex_attention import BlockMask

    if "flex" not in blocks.kept:
        with torch.inference_mode(False):  # inference tensors could not be saved for a backward
            live, full = blocks.pairs(BLOCK, BLOCK)
            partial, whole = _ordered(live & ~full), _ordered(full)
            blocks.kept["flex"] = BlockMask.from_kv_blocks(
                *partial,
                *whole,
                BLOCK_SIZE=BLOCK,
                mask_mod=mask_function(blocks),
                seq_lengths=(blocks.queries, len(blocks.end)),
            )
    return blocks.kept["flex"]


def mask_function(blocks: BlockMap) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The attention rule over (batch, head, query, key): j <= i < subtree_end[j], and the window in depth."""
    end, rows, depth, window = blocks.end, blocks.rows, blocks.depth, blocks.window

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query if rows is None else rows[query]
        seen = (key <= row) & (row < end[key])
        if depth is not None and window is not None:
            distance = depth[row] - depth[key]
            seen = seen & (distance >= 0) & (distance < window)
        return seen

    return mask


def _softcap(cap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def modify(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return modify


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(number, indices) of the chosen blocks of each row, chosen ones first: int32 [1, 1, n] and [1, 1, n, m]."""
    index = torch.argsort((~chosen).int(), dim=1, stable=True).int()
    return chosen.sum(1, dtype=torch.int32)[None, None], index[None, None]


@functools.cache
def _flex(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = flex_attention
    return torch.compile(compiled, dynamic=True) if device_type == "cuda" else compiled
