"""Registration of tree attention with `torch.library`: op, fake implementation, autograd. No arithmetic here.

A backend is a module with

    forward(call: AttentionCall) -> AttentionResult
    backward(call, result, grad_out [B, Hq, Tq, dv], grad_lse [B, Hq, Tq] or None) -> AttentionGradients

for calls with dense rows (`AttentionCall.dense`). `reference` and `flex` are plain autograd and have no op.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tuna_kernels import derivatives
from tuna_kernels.arguments import dense_rows, register_fake
from tuna_kernels.attention import cpu as attention_cpu
from tuna_kernels.attention import flash
from tuna_kernels.attention import torch as attention_torch
from tuna_kernels.attention.call import AttentionCall, AttentionResult
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
    """An `AttentionResult`; see `tuna_kernels.attention.tree_attention.tree_attention`."""
    call = AttentionCall(q, k, v, subtree_end, query_rows, position_ids, window, scale, softcap)
    with torch.autocast(q.device.type, enabled=False):  # or it would autocast the float32 products
        out, lse = BACKENDS[backend].forward(call.dense())
        if sinks is not None:
            share, lse = beside_sinks(lse, sinks)
            out.mul_(share)
    return out, lse


@torch.library.custom_op("tuna_kernels::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    query_rows: Tensor | None,
    position_ids: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`AttentionGradients` for the gradients of both outputs, in the layouts of `torch.empty_like`."""
    call = AttentionCall(q, k, v, subtree_end, query_rows, position_ids, window, scale, softcap)
    result = AttentionResult(dense_rows(out), lse.contiguous())
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv = BACKENDS[backend].backward(call.dense(), result, dense_rows(grad_out), grad_lse)
    return _laid_out_like(q, dq), _laid_out_like(k, dk), _laid_out_like(v, dv)


def _laid_out_like(x: Tensor, gradient: Tensor) -> Tensor:
    if gradient.stride() == torch.empty_like(x, device="meta").stride():
        return gradient
    return torch.empty_like(x).copy_(gradient)


@register_fake(tree_attention)
def _(given: Any) -> tuple[Tensor, Tensor]:
    out, lse = AttentionCall(given.q, given.k, given.v, given.subtree_end).empty_result()
    return out, lse


@register_fake(tree_attention_backward)
def _(given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(given.q), torch.empty_like(given.k), torch.empty_like(given.v)


def _setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    call = AttentionCall(*(getattr(inputs, name) for name in AttentionCall._fields))
    ctx.save_for_backward(*call[:6], *output, inputs.sinks)
    ctx.settings, ctx.backend = call[6:], inputs.backend  # window, scale, softcap
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, saved: Sequence[Any], grad_out: Tensor | None, grad_lse: Tensor | None
) -> dict[str, Tensor | None]:
    *tensors, out, lse, sinks = saved
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv = tree_attention_backward(
        *tensors, *ctx.settings, out=out, lse=lse, grad_out=grad_out, grad_lse=grad_lse, backend=ctx.backend
    )
    gradients: dict[str, Tensor | None] = {"q": dq, "k": dk, "v": dv}
    if ctx.needs.sinks:
        with torch.autocast(out.device.type, enabled=False):
            gradients["sinks"] = sinks_gradient(grad_out, grad_lse, out, lse, sinks)
    return gradients


derivatives.register(tree_attention, setup_context=_setup_context, backward=_backward)
derivatives.register(tree_attention_backward)
