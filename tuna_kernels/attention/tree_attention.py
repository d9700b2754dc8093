"""Attention over a packed tree: group boundaries, the shared prompt and any deeper sharing in one rule.

    row i attends to row j exactly when  j <= i < subtree_end[j]

Backends: `triton` (kernels for GPUs), `cpu` (native code: float32 arithmetic on float32, bfloat16 and float16),
`torch` (block by block, any device and dtype), `reference` (the whole mask, the oracle), and optionally `flex` and
`flash`; see docs/attention.md. Only the oracle computes T × T across groups or branches; on `cpu` and `torch` a
group's attention has the same bits alone and batched.

Not supported: attention dropout (it would be drawn once for a shared prompt, but k times for k separate ones) and
additive biases (no model among the tested families trains with them).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from tuna_kernels.arguments import should_validate
from tuna_kernels.attention import flash, flex, ops, reference
from tuna_kernels.attention.call import AttentionCall
from tuna_kernels.attention.triton import launches
from tuna_kernels.dispatch import resolve_backend, why_not

__all__ = ["tree_attention"]

_AUTOGRAD: dict[str, ModuleType] = {"reference": reference, "flex": flex}
"""Backends that PyTorch differentiates; the others are in `attention.ops.BACKENDS`."""
_BACKENDS = (*_AUTOGRAD, *ops.BACKENDS)


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    query_rows: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    query_rows: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    query_rows: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the rows of a packed tree to their ancestors and themselves.

    Args:
        q: [B, Hq, Tq, d] float queries. The tree is the same for all B; Hq is a multiple of Hkv (query head h uses
            key head `h // (Hq / Hkv)`).
        k: [B, Hkv, T, d] keys of all T packed rows, with q's dtype and device.
        v: [B, Hkv, T, dv] values.
        subtree_end: [T] int64, one past the last row of the subtree below row j (`PackedTree.subtree_end`).
        query_rows: [Tq] int64 packed row of each query, in any order; default: all rows (Tq = T).
        position_ids: [T] int64 depth of each row; required with `window`.
        window: w >= 1: row j is seen only if also `0 <= depth_i - depth_j < w`. Depth, not packed rows: a
            branch measures distance along its own sequence. A row always sees itself.
        scale: factor on the scores; default `1 / sqrt(d)`.
        softcap: c > 0: scores become `c * tanh(score / c)`, after `scale`.
        sinks: [Hq] float, one learned logit per query head, added to the denominator of all its rows without a
            value (GPT-OSS); differentiable; neither scaled nor capped; -inf means no sink.
        return_lse: also return the log-sum-exp of the scores, including the sink; differentiable.
        backend: `"auto"` (the environment variable `TUNA_KERNELS_BACKEND` if set, else `"triton"` on CUDA or `"cpu"`
            on CPU if they support the inputs, else `"torch"`), one of those, `"reference"`, `"flex"` (PyTorch's
            FlexAttention) or `"flash"` (flash-attn).

    Returns:
        out [B, Hq, Tq, dv] in q's dtype, computed in float32 (float64 for float64 inputs); with
        `return_lse` the pair (out, lse [B, Hq, Tq] float32 or float64). Differentiable in q, k, v and sinks: once,
        in reverse mode; with backend `"reference"` to any order and in both modes.
        Under autocast q, k and v are cast to its dtype first, as for PyTorch's own attention.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not match, or `subtree_end[j]` outside (j, T].
        IndexError: a query row outside [0, T).
        TypeError: an argument that is not a tensor of the right dtype.
        RuntimeError: a backend that does not support this call, with the reason.

    Examples:
        >>> q = k = torch.zeros(1, 1, 3, 2)
        >>> v = torch.tensor([[[[2.0], [4.0], [8.0]]]])  # a prompt of one token, two responses of one
        >>> tree_attention(q, k, v, torch.tensor([3, 2, 3])).flatten().tolist()
        [2.0, 3.0, 5.0]
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    _check_tensors(q, k, v)
    _check_tree(k, q, subtree_end, query_rows, position_ids)
    _check_settings(window, position_ids, softcap)
    _check_sinks(sinks, q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    chosen = choose_backend(backend, q, k, v, query_rows)
    call = AttentionCall(q, k, v, subtree_end, query_rows, position_ids, window, scale, softcap)
    if chosen in _AUTOGRAD:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = _AUTOGRAD[chosen].tree_attention(call, sinks)
    else:
        out, lse = ops.tree_attention(*call, backend=chosen, sinks=sinks)
    return (out, lse) if return_lse else out


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} dimensions, not the 4 of [batch, heads, rows, head size]")
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}, not a floating dtype")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: they must agree")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k {list(k.shape)} does not fit q {list(q.shape)}: batch and head size must agree")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {list(v.shape)} does not fit k {list(k.shape)}: only the head size may differ")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, not a multiple of the {k.shape[1]} of k and v")


def _check_tree(
    k: Tensor, q: Tensor, subtree_end: Tensor, query_rows: Tensor | None, position_ids: Tensor | None
) -> None:
    total = k.shape[2]
    lengths = {"subtree_end": total, "query_rows": q.shape[2], "position_ids": total}
    given = {"subtree_end": subtree_end, "query_rows": query_rows, "position_ids": position_ids}
    for name, x in given.items():
        if x is None:
            continue
        if x.dtype != torch.int64:
            raise TypeError(f"{name} is {x.dtype}, not torch.int64")
        if x.shape != (lengths[name],):
            raise ValueError(f"{name} has shape {list(x.shape)}, not [{lengths[name]}]")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: they must agree")
    if query_rows is None and q.shape[2] != total:
        raise ValueError(f"q has {q.shape[2]} rows and k {total}: give the rows of the queries as query_rows")


def _check_settings(window: int | None, position_ids: Tensor | None, softcap: float | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window = {window} is below 1: a row sees at least itself")
    if window is not None and position_ids is None:
        raise ValueError("window needs position_ids, the depth of each row: packed rows do not measure distance")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap} is not above 0")


def _check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    if sinks is None:
        return
    if not sinks.is_floating_point():
        raise TypeError(f"sinks is {sinks.dtype}, not a floating dtype")
    if sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks has shape {list(sinks.shape)}, not [{q.shape[1]}], one for each head of q")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}, q on {q.device}: they must agree")
    readable = should_validate(None, sinks) and not is_functorch_wrapped_tensor(sinks)
    if readable and bool((sinks == math.inf).any()):
        head = int((sinks == math.inf).nonzero()[0])
        raise ValueError(f"sinks[{head}] = inf would hide all keys; it must be finite, or -inf for none")


def check_backend(name: str, argument: str = "backend") -> None:
    """Raise `ValueError` unless `name` is a backend of tree attention or `"auto"`."""
    if name not in ("auto", *_BACKENDS):
        raise ValueError(f"{argument} = {name!r} is not one of {('auto', *_BACKENDS)}")


def choose_backend(backend: str, q: Tensor, k: Tensor, v: Tensor, query_rows: Tensor | None) -> str:
    """The backend of a call; checks backends that only attention has or that depend on more than dtypes."""

    def refuses(name: str) -> str:
        if name == "triton":
            return launches.why_not(q, v)
        if name == "flex":
            return flex.why_not(q, k, v)
        return flash.why_not(q, v, query_rows) if name == "flash" else why_not(name, q.device, q.dtype)

    return resolve_backend(backend, q.device, q.dtype, known=_BACKENDS, refuses=refuses)
