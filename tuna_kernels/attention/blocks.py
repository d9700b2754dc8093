"""Two ways to compute one block of attention in torch operations: the formula, and PyTorch's CPU flash kernel.

Shapes: Q, O and their gradients [B, H, m, d] with the G query heads of a key head folded into rows (m = G·bq), K
and V [B, H, nk, d], lse [B, H, m], all in the compute dtype.

    z = softcap(scale·Q Kᵀ)    p = exp(z - lse)    O = p V
    dV = pᵀ dO    dz = p ∘ (dO Vᵀ - Δ)    Δ = rowsum(dO ∘ O) - dlse    dQ = scale·dz K    dK = scale·dzᵀ Q

`MATH` is the formula and supports everything. `FLASH` is the kernel that `scaled_dot_product_attention` runs on CPUs,
called directly since we need its log-sum-exp; it keeps scores in the cache. For float32 without softcap at the sizes
of a 135M model (9 heads on 3, head size 64, prompts of 80 and five responses of 150 to 250 tokens) it takes 0.8 of
MATH's CPU time forward and 0.9 backward on one idle core, 0.65 and 0.75 with shared cores and caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tuna_kernels.attention.block_plan import Block

LARGE_LSE = 32.0
"""Above it the rounding of a float32 lse would be many roundings of a probability: such blocks use `MATH`."""

ROUNDINGS = 2
"""Roundings of lse within which a row's recomputed log-sum-exp counts as equal to it."""


class Route(Protocol):
    """One way to compute a block."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Returns `(out, lse)`."""
        ...

    def backward(
        self,
        given: BlockBackward,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block: Block,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `(dq, dk, dv)`."""
        ...


@dataclass(frozen=True)
class BlockBackward:
    """Inputs of a block's backward: dO and O [B, H, m, d], lse and dlse [B, H, m] (dlse may be None)."""

    grad_out: Tensor
    out: Tensor
    lse: Tensor
    grad_lse: Tensor | None


class _Math:
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        z, _ = _scores(q * scale, k, block, softcap)
        top = z.amax(-1, keepdim=True)
        p = z.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        return (p @ v).div_(total), top.add_(total.log_()).squeeze(-1)

    def backward(
        self,
        given: BlockBackward,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block: Block,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = q * scale
        z, slope = _scores(q, k, block, softcap)
        p = _probabilities(z, given.lse.unsqueeze(-1))
        delta = (given.grad_out * given.out).sum(-1)
        if given.grad_lse is not None:
            delta -= given.grad_lse
        dv = p.transpose(-1, -2) @ given.grad_out
        dz = given.grad_out @ v.transpose(-1, -2)
        dz.sub_(delta.unsqueeze(-1)).mul_(p)
        if slope is not None:
            dz.mul_(slope)
        return (dz @ k).mul_(scale), dz.transpose(-1, -2) @ q, dv


class _Flash:
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(q, k, v, attn_mask=_bias(q, k, block), scale=scale)
        return MATH.forward(q, k, v, block, scale, softcap) if _large(lse) else (out, lse)

    def backward(
        self,
        given: BlockBackward,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block: Block,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _large(given.lse):
            return MATH.backward(given, q, k, v, block, scale, softcap)
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = op(
            given.grad_out,
            q,
            k,
            v,
            given.out,
            given.lse,
            0.0,
            False,
            attn_mask=_bias(q, k, block),
            scale=scale,
        )
        return dq, dk, dv


MATH: Route = _Math()
FLASH: Route = _Flash()


def choose(q: Tensor, v: Tensor, softcap: float | None, grad_lse: Tensor | None = None) -> Route:
    """The fastest route that supports this: flash has no softcap and no gradient for lse.

    float64 uses the formula, for exactness: the kernel's exponential is an approximation.
    """
    flash = (
        q.device.type == "cpu"
        and q.dtype != torch.float64
        and q.shape[3] == v.shape[3]
        and softcap is None
        and grad_lse is None
    )
    return FLASH if flash else MATH


def _scores(q: Tensor, k: Tensor, block: Block, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Masked scores z [B, H, m, nk] of scaled queries, and d softcap / d score if there is a softcap."""
    z = q @ k.transpose(-1, -2)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z * z
        z.mul_(softcap)
    if block.hidden is not None:
        rows = block.stop - block.start
        by_head = z.view(*z.shape[:2], z.shape[2] // rows, rows, z.shape[3])
        by_head[..., block.open :].masked_fill_(block.hidden, float("-inf"))
    return z, slope


def _large(lse: Tensor) -> bool:
    return bool((lse.abs() > LARGE_LSE).any())


def _probabilities(z: Tensor, lse: Tensor) -> Tensor:
    """e^(z - lse), in place. A large lse has a large rounding error: there a row is normalized to sum to exactly 1,
    unless a sink is part of its denominator."""
    top = z.amax(-1, keepdim=True)
    p = z.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    beside = (top + total.log()).sub_(lse)
    rounding = ROUNDINGS * torch.finfo(lse.dtype).eps * lse.abs()
    whole = (lse.abs() > LARGE_LSE) & (beside > -rounding)
    return p.mul_(torch.where(whole, 1 / total, (top - lse).exp()))


def _bias(q: Tensor, k: Tensor, block: Block) -> Tensor | None:
    """The mask in flash's layout: [1, 1, m, nk], 0 or -inf, the rows of the query heads one after the other."""
    if block.hidden is None:
        return None
    rows = block.stop - block.start
    bias = q.new_zeros(q.shape[2] // rows, rows, k.shape[2])
    bias[:, :, block.open :].masked_fill_(block.hidden, float("-inf"))
    return bias.view(1, 1, q.shape[2], k.shape[2])
