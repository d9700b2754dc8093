"""Attention over a packed tree in C++ (csrc/cpu/attention): float32 arithmetic on float32, bfloat16 and float16.

The interface is addresses, strides and a thread count. The native code plans its own blocks from the tree alone,
which takes little time compared with the work, so nothing is cached between calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuna_kernels.attention.block_plan import check_rows, check_subtree_end
from tuna_kernels.attention.call import AttentionCall, AttentionGradients, AttentionResult
from tuna_kernels.native import ELEMENTS, address, instruction_set, native


def forward(call: AttentionCall) -> AttentionResult:
    """See `tuna_kernels.attention.ops`."""
    result = call.empty_result()
    _NativeCall(call, result).forward()
    return result


def backward(
    call: AttentionCall, result: AttentionResult, grad_out: Tensor, grad_lse: Tensor | None
) -> AttentionGradients:
    """See `tuna_kernels.attention.ops`."""
    return _NativeCall(call, result).backward(grad_out, grad_lse)


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
    """Bytes of working memory of the forward or backward of such a call, beyond its inputs and results.

    Each thread holds the keys and values of one task, in float32 and rearranged; the backward also holds each task's
    part of dK and dV.
    """
    meta = torch.empty(batch, heads, len(subtree_end), size, device="meta")
    keys = torch.empty(batch, key_heads, len(subtree_end), size, device="meta")
    values = torch.empty(batch, key_heads, len(subtree_end), size if value_size is None else value_size, device="meta")
    call = AttentionCall(meta, keys, values, subtree_end)
    return 4 * _NativeCall(call, AttentionResult(meta, meta)).workspace(backward=backward)


class _NativeCall:
    """One call of the native code; owns every tensor whose address it passes."""

    def __init__(self, call: AttentionCall, result: AttentionResult) -> None:
        self.call, self.result = call, result
        q, k, v, end, rows, depth, window, scale, softcap = call
        check_subtree_end(end.numpy())
        if rows is not None:
            check_rows(rows.numpy(), len(end))
        self._native = native().Attention(
            subtree_end=end.data_ptr(),
            depth=address(None if window is None else depth),
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
            q=_strided(q),
            k=_strided(k),
            v=_strided(v),
            out=_strided(result.out),
            lse=result.lse.data_ptr(),
        )

    def workspace(self, *, backward: bool) -> int:
        """Floats of working memory."""
        measure = self._native.backward_workspace if backward else self._native.forward_workspace
        return int(measure(torch.get_num_threads()))

    def forward(self) -> None:
        """Compute `out` and `lse` in place."""
        threads = torch.get_num_threads()
        workspace = torch.empty(self.workspace(backward=False))
        self._native.forward(workspace=workspace.data_ptr(), threads=threads, instruction_set=instruction_set())

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None) -> AttentionGradients:
        """Gradients, from the existing `out` and `lse`."""
        threads = torch.get_num_threads()
        workspace = torch.empty(self.workspace(backward=True))
        gradients = self.call.empty_gradients()
        self._native.backward(
            grad_out=_strided(grad_out),
            grad_lse=address(grad_lse),
            dq=_strided(gradients.q),
            dk=_strided(gradients.k),
            dv=_strided(gradients.v),
            workspace=workspace.data_ptr(),
            threads=threads,
            instruction_set=instruction_set(),
        )
        return gradients


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    """Address, and the strides of batch, head and row."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)
