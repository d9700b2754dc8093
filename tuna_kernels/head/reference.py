"""Plain PyTorch with autograd: the oracle that every other backend is compared with.

The only place with full `[rows, vocabulary]` logits. Half-precision inputs are converted to float32 as a
whole; in float64 it is the ground truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuna_kernels.arguments import compute_dtype


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
    want_entropy: bool = True,
    want_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(logprobs, lse, entropy)`, each [M], and the softmax `state` [3, M]: the target's logit, the largest logit,
    the log of the sum relative to it; empty if not requested. `low_rank` is (hidden2 [T, r], weight2 [V, r])."""
    given = (hidden, weight, bias, *(low_rank or ()))
    dtype = compute_dtype(*(t.dtype for t in given if t is not None))
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
    counted = targets != ignore_index
    logits, target_logit = _of_counted(logits, targets, counted)
    entropy = state = logits.new_empty(0)
    if want_state:
        with torch.no_grad():
            largest = logits.amax(-1)
            sums = (logits - largest.unsqueeze(-1)).exp().sum(-1)
            state = torch.where(counted, torch.stack([target_logit, largest, sums.log()]), 0)
        # A shard without any probability has weight 0, but its log-sum-exp has gradient NaN, and 0 * NaN is NaN.
        logits = logits.masked_fill((largest == -torch.inf).unsqueeze(-1), 0)
    lse = torch.logsumexp(logits, -1)
    if want_entropy:
        log_p = logits - lse.unsqueeze(-1)
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)  # 0 times infinity counts as 0
        entropy = torch.where(counted, entropy, 0)
    return torch.where(counted, target_logit - lse, 0), torch.where(counted, lse, 0), entropy, state


def selective_logprobs(logits: Tensor, targets: Tensor, *, temperature: float, ignore_index: int) -> Tensor:
    """Log-probability [...] of each target under `softmax(logits / temperature)`."""
    counted = targets != ignore_index
    logits, target_logit = _of_counted(logits.to(compute_dtype(logits.dtype)) / temperature, targets, counted)
    return torch.where(counted, target_logit - torch.logsumexp(logits, -1), 0)


def _of_counted(logits: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """`(logits, target logits)`; ignored rows are set to zero, whatever they contained."""
    logits = logits.masked_fill(~counted.unsqueeze(-1), 0)
    return logits, logits.gather(-1, torch.where(counted, targets, 0).unsqueeze(-1)).squeeze(-1)
