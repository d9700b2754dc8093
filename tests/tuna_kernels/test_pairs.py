"""Products of packed bfloat16: exact to float32 sums, the same bits for a row and whatever the threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuna_kernels.backends.cpu import NativeTileOps, multiplies
from tuna_kernels.backends.products import Products
from tuna_kernels.backends.slots import Slots

HALF = torch.bfloat16
pytestmark = pytest.mark.skipif(not multiplies(HALF), reason="this processor has no AVX512_BF16")


def _products(rows: Tensor, tokens: int) -> Products:
    slots = Slots.build(torch.zeros(rows.numel(), dtype=torch.int64), rows, ignore_index=-1)
    assert slots.rows.numel() <= tokens
    return NativeTileOps().products(slots, torch.float32, HALF, HALF)


def _near(got: Tensor, exact: Tensor, size: Tensor) -> None:
    """Within a few roundings of the sum of the terms' sizes; the sums are short."""
    assert ((got.double() - exact).abs() <= 8 * torch.finfo(torch.float32).eps * size + 1e-30).all()


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 200),
    width=st.integers(1, 70),
    vocabulary=st.integers(1, 150),
    long=st.sampled_from([0, 0, 0, 1100]),
    add=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equal_float64(count: int, width: int, vocabulary: int, long: int, add: bool, seed: int) -> None:
    """All three, for any remainder of panels, vectors and pairs; ``long``: a sum of more pairs than go at once."""
    g = torch.Generator().manual_seed(seed)
    width += long
    hidden = torch.randn(count + 3, width, generator=g).to(HALF)
    weight = torch.randn(vocabulary + 2, width, generator=g).to(HALF)
    gradient = torch.randn(count, vocabulary, generator=g)
    rounded = gradient.to(HALF).double()
    products = _products(torch.arange(3, count + 3), count + 3)
    rows, columns = slice(0, count), slice(2, vocabulary + 2)
    h, w = hidden[3:].double(), weight[2:].double()
    before = 1.0 if add else 0.0

    out = torch.randn(max(count, 16), vocabulary, generator=g)
    start = before * out.double()[:count]
    products.logits(out, hidden, rows, weight, columns, add=add)
    _near(out[:count], start + h @ w.t(), start.abs() + h.abs() @ w.abs().t())

    out = torch.randn(count, width, generator=g)
    start = out.double()
    products.add_to_rows(out, gradient, weight, columns)
    _near(out, start + rounded @ w, start.abs() + rounded.abs() @ w.abs())

    out = torch.randn(vocabulary, width, generator=g)
    start = before * out.double()
    products.add_to_weight(out, gradient, hidden, rows, beta=before)
    _near(out, start + rounded.t() @ h, start.abs() + rounded.t().abs() @ h.abs())


def test_a_row_has_the_same_bits_alone_and_on_any_number_of_threads() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(301, 1201, generator=g).to(HALF), torch.randn(205, 1201, generator=g).to(HALF)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = torch.empty(301, 205)
        _products(torch.arange(301), 301).logits(out, hidden, slice(0, 301), weight, slice(0, 205), add=False)
        results.append(out)
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = torch.empty(16, 205)
    _products(torch.tensor([200]), 301).logits(alone, hidden, slice(0, 1), weight, slice(0, 205), add=False)
    assert torch.equal(alone[0], results[0][200])


def test_nan_stays_in_its_row_and_infinity_is_kept() -> None:
    hidden, weight = torch.ones(40, 8, dtype=HALF), torch.ones(70, 8, dtype=HALF)
    hidden[7, 3], hidden[8, 2] = torch.nan, torch.inf
    out = torch.empty(40, 70)
    _products(torch.arange(40), 40).logits(out, hidden, slice(0, 40), weight, slice(0, 70), add=False)
    assert out[7].isnan().all() and out[8].isinf().all()
    assert (out[torch.arange(40)[(torch.arange(40) < 7) | (torch.arange(40) > 8)]] == 8).all()
