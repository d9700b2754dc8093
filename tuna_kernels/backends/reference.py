"""Textbook PyTorch with plain autograd: the oracle that every other backend is compared with.

The one place that holds full ``[rows, vocabulary]`` logits. Half-precision inputs are converted to float32
whole; in float64 it is the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    *,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logprobs, lse, entropy)``, each [M]; ``low_rank`` is (hidden2 [T, r], weight2 [V, r])."""
    dtype = compute_dtype(hidden.dtype, weight.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if low_rank is not None:
        logits = logits + low_rank[0].to(dtype) @ low_rank[1].to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if rows is not None:
        logits = logits[rows]
    logprobs, lse = _gather(logits, targets, ignore_index)
    log_p = logits - lse.unsqueeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    counted = targets != ignore_index
    return logprobs, torch.where(counted, lse, 0), torch.where(counted, entropy, 0)


def selective_logprobs(logits: Tensor, targets: Tensor, *, temperature: float, ignore_index: int) -> Tensor:
    """[...]: log-probability of each target under ``softmax(logits / temperature)``."""
    return _gather(logits.to(compute_dtype(logits.dtype)) / temperature, targets, ignore_index)[0]


def _gather(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    counted = targets != ignore_index
    lse = torch.logsumexp(logits, -1)
    chosen = logits.gather(-1, torch.where(counted, targets, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, chosen - lse, 0), lse
