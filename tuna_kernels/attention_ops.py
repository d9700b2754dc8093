"""Registration of tree attention with `torch.library`: op, fake implementation, autograd. No arithmetic here.

A backend is a module with `forward` and `backward` of the signatures in `attention_torch`; `reference` and `flex`
are plain autograd and have no op.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tuna_kernels.backends import attention_cpu, attention_flash, attention_torch, attention_triton

BACKENDS: dict[str, ModuleType] = {
    "torch": attention_torch,
    "cpu": attention_cpu,
    "triton": attention_triton,
    "flash": attention_flash,
}


@torch.library.custom_op("tuna_kernels::tree_attention", mutates_args=())
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    query_rows: Tensor | None,
    position_ids: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(out [B, Hq, Tq, dv], lse [B, Hq, Tq])``; see `tuna_kernels.attention.tree_attention`."""
    with torch.autocast(q.device.type, enabled=False):  # or it would take the float32 products for its own
        results: tuple[Tensor, Tensor] = BACKENDS[backend].forward(
            q, k, v, subtree_end, query_rows, position_ids, window, scale, softcap
        )
    return results


@torch.library.custom_op("tuna_kernels::tree_attention_backward", mutates_args=())
def tree_attention_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` for the gradients of both outputs."""
    with torch.autocast(q.device.type, enabled=False):
        gradients: tuple[Tensor, Tensor, Tensor] = BACKENDS[backend].backward(
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            subtree_end,
            query_rows,
            position_ids,
            window,
            scale,
            softcap,
        )
    return gradients


@tree_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return attention_torch.empty_outputs(q, v)


@tree_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale, ctx.softcap, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, subtree_end, query_rows, position_ids, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = tree_attention_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        subtree_end,
        query_rows,
        position_ids,
        ctx.window,
        ctx.scale,
        ctx.softcap,
        ctx.backend,
    )
    return (*grads, *[None] * 7)


tree_attention.register_autograd(_backward, setup_context=_setup_context)
