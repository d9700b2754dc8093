"""Attention over a packed tree in C++ (csrc/cpu/attention): float32 arithmetic on float32, bfloat16 and float16.

Addresses, strides and a thread count cross the border. The native code plans its blocks itself, from the tree alone,
in a time that is small beside the work, so that nothing is kept between calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuna_kernels.attention.block_plan import check_rows, check_subtree_end
from tuna_kernels.attention.torch import empty_outputs
from tuna_kernels.native import ELEMENTS, address, instruction_set, native


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    query_rows: Tensor | None,
    position_ids: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """``(out [B, Hq, Tq, dv], lse [B, Hq, Tq])``; out in q's dtype, laid out as [B, Tq, Hq, dv] in memory."""
    out, lse = empty_outputs(q, v)
    call = _Call(q, k, v, out, lse, subtree_end, query_rows, position_ids, window, scale, softcap)
    call.forward()
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    query_rows: Tensor | None,
    position_ids: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` in the dtypes of q, k and v."""
    call = _Call(q, k, v, out, lse, subtree_end, query_rows, position_ids, window, scale, softcap)
    return call.backward(grad_out, grad_lse)


def workspace_bytes(
    subtree_end: Tensor,
    *,
    heads: int,
    key_heads: int,
    size: int,
    value_size: int | None = None,
    batch: int = 1,
    backward: bool = False,
) -> int:
    """Bytes of working memory that the forward or backward of such a call takes beyond its inputs and results.

    A thread keeps the keys and values of one task, in float32 and rearranged; the backward also holds each task's
    share of dK and dV.
    """
    meta = torch.empty(batch, heads, len(subtree_end), size, device="meta")
    keys = torch.empty(batch, key_heads, len(subtree_end), size, device="meta")
    values = torch.empty(batch, key_heads, len(subtree_end), size if value_size is None else value_size, device="meta")
    call = _Call(meta, keys, values, meta, meta, subtree_end, None, None, None, 1.0, None)
    return 4 * call.workspace(backward=backward)


class _Call:
    """One call of the native code; owns every tensor whose address it gives away."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        subtree_end: Tensor,
        query_rows: Tensor | None,
        position_ids: Tensor | None,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        end, rows, depth = subtree_end, query_rows, None if window is None else position_ids
        check_subtree_end(end.numpy())
        if rows is not None:
            check_rows(rows.numpy(), len(end))
        self.q, self.k, self.v = q, k, v
        self._kept = [q, k, v, out, lse]
        self._kept += [x for x in (end, rows, depth) if x is not None]
        self._native = native().Attention(
            subtree_end=end.data_ptr(),
            depth=address(depth),
            rows=len(end),
            window=window or 0,
            query_rows=address(rows),
            batch=q.shape[0],
            heads=q.shape[1],
            key_heads=k.shape[1],
            queries=q.shape[2],
            size=q.shape[3],
            value_size=v.shape[3],
            scale=scale,
            cap=softcap or 0.0,
            element=ELEMENTS[q.dtype],
            q=_strided(self._kept[0]),
            k=_strided(self._kept[1]),
            v=_strided(self._kept[2]),
            out=_strided(self._kept[3]),
            lse=self._kept[4].data_ptr(),
        )

    def workspace(self, *, backward: bool) -> int:
        """Floats of working memory."""
        measure = self._native.backward_workspace if backward else self._native.forward_workspace
        return int(measure(torch.get_num_threads()))

    def forward(self) -> None:
        """Fill the ``out`` and ``lse`` given."""
        threads = torch.get_num_threads()
        workspace = torch.empty(self.workspace(backward=False))
        self._native.forward(workspace=workspace.data_ptr(), threads=threads, instruction_set=instruction_set())

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` from ``out`` and ``lse`` as they are."""
        threads = torch.get_num_threads()
        workspace = torch.empty(self.workspace(backward=True))
        dq, dk, dv = (torch.empty_like(x) for x in (self.q, self.k, self.v))
        self._native.backward(
            grad_out=_strided(grad_out),
            grad_lse=address(grad_lse),
            dq=_strided(dq),
            dk=_strided(dk),
            dv=_strided(dv),
            workspace=workspace.data_ptr(),
            threads=threads,
            instruction_set=instruction_set(),
        )
        return dq, dk, dv


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of batch, head and row."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)
