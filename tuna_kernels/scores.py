"""Length-normalised sequence scores from per-token log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_scores(
    logprobs: Tensor,
    candidate_offsets: Tensor,
    *,
    length_penalty: float = 1.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """Score of each candidate: `sum(logprobs) / length ** length_penalty`.

    Sums are float64, in slot order, so a candidate's score on CPU does not depend on the rest of the
    batch. Plain differentiable PyTorch.

    Args:
        logprobs: [M] floating point, natural logarithm.
        candidate_offsets: [C+1] int64; candidate c has slots `candidate_offsets[c]:candidate_offsets[c+1]`.
        length_penalty: 1.0 gives the mean log-probability, 0.0 the sum.
        lengths: [C] positive lengths to divide by, if they differ from the numbers of slots.

    Returns:
        [C]: float64 for float64 log-probabilities, else float32.

    Raises:
        ValueError: shapes that do not match; on CPU also offsets that do not run from 0 to M, an empty
            candidate (with its position) or a length that is not positive.
        TypeError: `logprobs` not floating point, `candidate_offsets` not int64.

    Examples:
        >>> sequence_scores(torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 2, 3]))
        tensor([-2., -5.])
    """
    if not logprobs.is_floating_point():
        raise TypeError(f"logprobs must be floating point, got {logprobs.dtype}")
    if candidate_offsets.dtype != torch.int64:
        raise TypeError(f"candidate_offsets must be int64, got {candidate_offsets.dtype}")
    if logprobs.ndim != 1 or candidate_offsets.ndim != 1 or candidate_offsets.numel() < 1:
        raise ValueError(
            f"logprobs {list(logprobs.shape)} must be [M], candidate_offsets {list(candidate_offsets.shape)} [C+1]"
        )
    counts = candidate_offsets.diff()
    if lengths is not None and lengths.shape != counts.shape:
        raise ValueError(f"lengths {list(lengths.shape)} must be [{counts.numel()}], one per candidate")
    if not torch.compiler.is_compiling() and candidate_offsets.device.type == "cpu":
        _check_values(candidate_offsets, counts, lengths, logprobs.numel())
    slots = torch.arange(logprobs.numel(), device=logprobs.device)
    candidate = torch.bucketize(slots, candidate_offsets[1:], right=True)
    sums = torch.zeros(counts.numel(), dtype=torch.float64, device=logprobs.device)
    sums = sums.index_add(0, candidate, logprobs.double())
    divisor = (counts if lengths is None else lengths).double() ** length_penalty
    return (sums / divisor).to(torch.float64 if logprobs.dtype == torch.float64 else torch.float32)


def _check_values(offsets: Tensor, counts: Tensor, lengths: Tensor | None, slots: int) -> None:
    if int(offsets[0]) != 0 or int(offsets[-1]) != slots:
        raise ValueError(
            f"candidate_offsets must run from 0 to the {slots} slots of logprobs, "
            f"got {int(offsets[0])} to {int(offsets[-1])}"
        )
    for name, values in (("candidate_offsets", counts), ("lengths", lengths)):
        if values is not None and bool((values <= 0).any()):
            position = int((values <= 0).nonzero()[0])
            raise ValueError(f"{name}: candidate {position} has length {values[position].item()}, must be positive")
