"""The interpreter rounds as GPUs do, and its products are those of no BLAS: the same everywhere, a row's its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.triton.device import DEVICE
from tuna_kernels import linear_logprobs
from tuna_kernels.attention.tree_attention import tree_attention

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="not in the interpreter")


def test_kernels_multiply_without_a_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    def blas(*_: Any, **__: Any) -> None:
        raise AssertionError("the interpreter multiplied with NumPy's BLAS")

    for name in ("matmul", "dot", "einsum", "inner"):
        monkeypatch.setattr(np, name, blas)
    linear_logprobs(torch.zeros(3, 8), torch.zeros(20, 8), torch.tensor([0, 1, 2]), backend="triton")
    q, k, v = (torch.zeros(1, 1, 4, 16) for _ in range(3))
    tree_attention(q, k, v, torch.tensor([4, 4, 4, 4]), backend="triton")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_product_is_summed_term_by_term(dtype: type) -> None:
    from triton.runtime import interpreter

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 7)).astype(dtype), rng.standard_normal((2, 7, 3)).astype(dtype)
    d = rng.standard_normal((2, 5, 3)).astype(np.float32)
    left, right, start = (_Handle(x) for x in (a, b, d))
    found = interpreter.interpreter_builder.create_dot(left, right, start, None, 0).data
    assert found.dtype == d.dtype
    for place in np.ndindex(2, 5, 3):
        total = d.dtype.type(0)
        for i in range(7):
            total = total + d.dtype.type(a[place[0], place[1], i]) * d.dtype.type(b[place[0], i, place[2]])
        assert found[place] == total + d[place]


class _Handle:
    """What the interpreter keeps of a tensor, as far as a product looks at it."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.dtype = self

    @property
    def scalar(self) -> Any:
        import triton.language as tl

        return tl.float32


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def cast(given: Any, found: Any, SIZE: tl.constexpr) -> None:
        places = tl.arange(0, SIZE)
        tl.store(found + places, tl.load(given + places).to(tl.bfloat16))

    given = torch.cat([torch.tensor([1 - 2**-24, 1 + 2**-8, 1 + 3 * 2**-8, -3e38, float("inf")]), torch.randn(59)])
    found = torch.empty(64, dtype=torch.bfloat16)
    cast[(1,)](given, found, 64)
    assert torch.equal(found, given.to(torch.bfloat16))
