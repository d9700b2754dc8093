"""Inputs and outputs of one call of tree attention, the same for all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tuna_kernels.arguments import compute_dtype, dense_rows


class AttentionCall(NamedTuple):
    """The inputs of one call; the ops take these fields as arguments, in this order.

    Attributes:
        q: [B, Hq, Tq, d].
        k: [B, Hkv, T, d].
        v: [B, Hkv, T, dv].
        subtree_end: [T] int64.
        query_rows: [Tq] int64 packed row of each query; None: all rows in order.
        position_ids: [T] int64 depth of each row; needed with `window`.
        window: in depth, or None.
        scale: factor on the scores.
        softcap: c in `c tanh(score / c)`, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    subtree_end: Tensor
    query_rows: Tensor | None = None
    position_ids: Tensor | None = None
    window: int | None = None
    scale: float = 1.0
    softcap: float | None = None

    def dense(self) -> AttentionCall:
        """A copy with dense rows (stride 1 along the head size), as backends with an op require."""
        q, k, v = map(dense_rows, self[:3])
        rows, depth = (None if x is None else x.contiguous() for x in (self.query_rows, self.position_ids))
        end = self.subtree_end.contiguous()
        return self._replace(q=q, k=k, v=v, subtree_end=end, query_rows=rows, position_ids=depth)

    def empty_result(self) -> AttentionResult:
        """Uninitialized outputs. The layout of out saves the model's transpose back to [B, Tq, Hq·dv]."""
        batch, heads, rows, _ = self.q.shape
        out = self.q.new_empty(batch, rows, heads, self.v.shape[3]).transpose(1, 2)
        return AttentionResult(out, self.q.new_empty(batch, heads, rows, dtype=compute_dtype(self.q.dtype)))

    def empty_gradients(self) -> AttentionGradients:
        """Uninitialized gradients, in the layouts of q, k and v if those have dense rows."""
        return AttentionGradients(*(dense_rows(torch.empty_like(x)) for x in self[:3]))


class AttentionResult(NamedTuple):
    """out [B, Hq, Tq, dv] in q's dtype, laid out as [B, Tq, Hq, dv] in memory; lse [B, Hq, Tq]."""

    out: Tensor
    lse: Tensor


class AttentionGradients(NamedTuple):
    """Gradients of q, k and v, in their dtypes."""

    q: Tensor
    k: Tensor
    v: Tensor
