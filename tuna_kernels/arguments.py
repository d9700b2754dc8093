"""What every op does with its arguments before it computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def should_validate(validate: bool | None, tensor: Tensor) -> bool:
    """Whether to look at values: never inside a compiled graph, nor where a fake tensor has none."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return tensor.device.type == "cpu" if validate is None else validate


def dense_rows(x: Tensor) -> Tensor:
    """``x`` itself if the entries of its last axis are neighbours in memory, else a copy in which they are."""
    return x if x.ndim == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
