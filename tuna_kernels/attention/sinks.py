"""Attention sinks: one logit per query head, added to the denominator of every row, without a value.

With o and lse of the attention without sinks, and s the head's sink (neither scaled nor capped),

    lse' = log(exp(lse) + exp(s))      o' = o * sigmoid(lse - s)      p_s = exp(s - lse')

Backends do not know about sinks: in the backward, given o' and lse', their probabilities exp(z - lse') are those with
the sink, and delta = rowsum(dO ∘ O') - dlse' is the whole row's, since the sink's value is 0. What remains is

    ds = -sum over the head's rows of p_s delta
"""

from __future__ import annotations

import torch
from torch import Tensor


def beside_sinks(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The factor on out [B, Hq, Tq, 1] due to the sinks [Hq], and lse' [B, Hq, Tq], in the dtype of lse."""
    of_rows = sinks.to(lse.dtype)[:, None]
    return torch.sigmoid(lse - of_rows).unsqueeze(-1), torch.logaddexp(lse, of_rows)


def sinks_gradient(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """ds [Hq] in the dtype of the sinks, from out' and lse' and the gradients of both."""
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)
