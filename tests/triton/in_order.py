"""Matrix products of torch that are the same on every machine: the textbook's, whose error is a bound of these tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class ProductsInOrder(TorchDispatchMode):
    """Within, matrices are multiplied term by term: in float32 or better, each product and each sum rounded once. A
    BLAS sums in an order of its own, and is a lucky one on some processors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            return _product(*args)
        return func(*args, **(kwargs or {}))


def _product(left: Tensor, right: Tensor) -> Tensor:
    dtype = torch.promote_types(left.dtype, torch.float32)
    wide_left, wide_right = left.to(dtype), right.to(dtype)
    total = torch.zeros(*left.shape[:-1], right.shape[-1], dtype=dtype, device=left.device)
    for i in range(left.shape[-1]):
        total += wide_left[..., :, i, None] * wide_right[..., i, None, :]
    return total.to(left.dtype)
