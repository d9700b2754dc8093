"""Registration of tree attention with `torch.library`: op, fake implementation, autograd. No arithmetic here.

A backend is a module with `forward` and `backward` of the signatures in `attention.torch`; `reference` and `flex`
are plain autograd and have no op.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tuna_kernels import derivatives
from tuna_kernels.arguments import dense_rows
from tuna_kernels.attention import cpu as attention_cpu
from tuna_kernels.attention import flash
from tuna_kernels.attention import torch as attention_torch
from tuna_kernels.attention.sinks import beside_sinks, sinks_gradient
from tuna_kernels.attention.triton import launches

BACKENDS: dict[str, ModuleType] = {
    "torch": attention_torch,
    "cpu": attention_cpu,
    "triton": launches,
    "flash": flash,
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
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out [B, Hq, Tq, dv], lse [B, Hq, Tq])``; see `tuna_kernels.attention.tree_attention.tree_attention`."""
    q, k, v = map(dense_rows, (q, k, v))
    tree = tuple(None if x is None else x.contiguous() for x in (subtree_end, query_rows, position_ids))
    with torch.autocast(q.device.type, enabled=False):  # or it would take the float32 products for its own
        out, lse = BACKENDS[backend].forward(q, k, v, *tree, window, scale, softcap)
        if sinks is not None:
            share, lse = beside_sinks(lse, sinks)
            out.mul_(share)
    return out, lse


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
    """``(dq, dk, dv)`` for the gradients of both outputs, in the layouts `torch.empty_like` gives them."""
    operands = (grad_out, q, k, v, out)
    dense_grad, *dense, dense_out = map(dense_rows, operands)
    of_lse = (None if x is None else x.contiguous() for x in (grad_lse, lse))
    dense_grad_lse, dense_lse = of_lse
    tree = tuple(None if x is None else x.contiguous() for x in (subtree_end, query_rows, position_ids))
    with torch.autocast(q.device.type, enabled=False):
        gradients: tuple[Tensor, Tensor, Tensor] = BACKENDS[backend].backward(
            dense_grad, dense_grad_lse, *dense, dense_out, dense_lse, *tree, window, scale, softcap
        )
    a, b, c = (
        gradient if given is used else torch.empty_like(given).copy_(gradient)
        for gradient, given, used in zip(gradients, (q, k, v), dense, strict=True)
    )
    return a, b, c


@tree_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return attention_torch.empty_outputs(q, v)


@tree_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale, ctx.softcap, ctx.backend, sinks = inputs
    ctx.save_for_backward(*tensors, sinks, *output)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, saved: Sequence[Any], grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, subtree_end, query_rows, position_ids, sinks, out, lse = saved
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
    of_sinks = None
    if sinks is not None and ctx.needs_input_grad[10]:
        with torch.autocast(q.device.type, enabled=False):
            of_sinks = sinks_gradient(grad_out, grad_lse, out, lse, sinks)
    return (*grads, *[None] * 7, of_sinks)


derivatives.register(tree_attention, setup_context=_setup_context, backward=_backward)
derivatives.register(tree_attention_backward)
