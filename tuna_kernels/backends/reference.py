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
    want_entropy: bool = True,
    want_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(logprobs, lse, entropy)``, each [M], and of the softmax ``state`` [3, M]: target's logit, the largest, log of
    the sum against that; empty where not wanted. ``low_rank`` is (hidden2 [T, r], weight2 [V, r])."""
    given = (hidden, weight, bias, *(low_rank or ()))
    dtype = compute_dtype(*(t.dtype for t in given if t is not None))
    counted = (targets != ignore_index).nonzero().squeeze(1)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if low_rank is not None:
        logits = logits + low_rank[0].to(dtype) @ low_rank[1].to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = _of_slots(logits, counted, rows)
    logprobs, lse, chosen = _gather(logits, targets[counted])
    entropy = state = None
    if want_entropy:
        log_p = logits - lse.unsqueeze(-1)
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)  # 0 times infinity counts as 0
    if want_state:
        with torch.no_grad():
            largest = logits.amax(-1)
            sums = (logits - largest.unsqueeze(-1)).exp().sum(-1)
            state = torch.stack([chosen, largest, sums.log()])

    def of_all(values: Tensor | None) -> Tensor:
        """Zero for ignored slots; empty for None."""
        if values is None:
            return logits.new_empty(0)
        out = values.new_zeros(*values.shape[:-1], targets.numel())
        return out.index_copy(-1, counted, values)

    return of_all(logprobs), of_all(lse), of_all(entropy), of_all(state)


def selective_logprobs(logits: Tensor, targets: Tensor, *, temperature: float, ignore_index: int) -> Tensor:
    """[...]: log-probability of each target under ``softmax(logits / temperature)``."""
    counted = (targets.reshape(-1) != ignore_index).nonzero().squeeze(1)
    rows = logits.to(compute_dtype(logits.dtype)).reshape(-1, logits.shape[-1]) / temperature
    logprobs, _, _ = _gather(_of_slots(rows, counted, None), targets.reshape(-1)[counted])
    return logprobs.new_zeros(targets.numel()).index_copy(0, counted, logprobs).view(targets.shape)


def _of_slots(logits: Tensor, counted: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of ``logits`` that serve the slots ``counted``; ignored ones take no part, whatever theirs hold."""
    if rows is not None:
        return logits[rows[counted]]
    return logits if counted.numel() == logits.shape[0] else logits[counted]


def _gather(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(logprobs, lse, logits of the targets)``."""
    lse = torch.logsumexp(logits, -1)
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - lse, lse, chosen
