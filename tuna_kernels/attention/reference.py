"""Attention over a packed tree: the whole [Tq, T] mask, plain autograd. The oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from tuna_kernels.arguments import compute_dtype
from tuna_kernels.attention.block_plan import check_values
from tuna_kernels.attention.call import AttentionCall, AttentionResult


def visible(
    subtree_end: Tensor,
    query_rows: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Bool [Tq, T]: whether query i sees row j, that is `j <= i < subtree_end[j]` and, with a window w,
    `0 <= depth_i - depth_j < w`."""
    keys = torch.arange(subtree_end.shape[0], device=subtree_end.device)
    rows = keys if query_rows is None else query_rows
    seen = (keys <= rows[:, None]) & (rows[:, None] < subtree_end)
    if window is not None and position_ids is not None:
        distance = position_ids[rows][:, None] - position_ids
        seen &= (distance >= 0) & (distance < window)
    return seen


def tree_attention(call: AttentionCall, sinks: Tensor | None = None) -> AttentionResult:
    """Attention in float32, or float64 for float64 inputs."""
    q, k, v, subtree_end, query_rows, position_ids, window, scale, softcap = call
    check_values(subtree_end, query_rows)
    dtype = compute_dtype(q.dtype)
    heads = q.shape[1] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(heads, dim=1)
    values = v.to(dtype).repeat_interleave(heads, dim=1)
    scores = q.to(dtype) @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(subtree_end, query_rows, position_ids, window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:  # one more column, with value 0
        column = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    probabilities = torch.softmax(scores, -1)[..., : seen.shape[1]]
    return AttentionResult((probabilities @ values).to(q.dtype), torch.logsumexp(scores, -1))
