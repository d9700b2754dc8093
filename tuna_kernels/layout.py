"""The layout that kernels are given: whatever strides a caller has, the entries of a row lie side by side."""

from __future__ import annotations

from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """``x`` itself if the entries of its last axis are neighbours in memory, else a copy in which they are."""
    return x if x.ndim == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
