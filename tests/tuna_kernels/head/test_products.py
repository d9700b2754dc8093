"""The products of the tile loop (csrc/cpu/head/products.h): float64 up to float32 sums, and a row's bits its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuna_kernels.head import cpu
from tuna_kernels.head.cpu import NativeTileOps
from tuna_kernels.head.products import Products
from tuna_kernels.head.slots import Slots

FROM_ENVIRONMENT = cpu.instruction_set
HALVES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(bool(cpu.WHY_NOT_HERE), reason=cpu.WHY_NOT_HERE)


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"], scope="module", autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every copy of the code that this processor can run; with the generic one the BLAS multiplies."""
    chosen = getattr(cpu.native().InstructionSet, request.param)
    if int(chosen) > int(cpu.native().best_instruction_set()):
        pytest.skip(f"this processor has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "instruction_set", lambda: chosen)
        yield request.param


def _products(rows: Tensor, hidden: Tensor, weight: Tensor) -> Products:
    slots = Slots.build(torch.zeros(rows.numel(), dtype=torch.int64), rows, ignore_index=-1)
    return NativeTileOps().products(slots, torch.float32, hidden.dtype, weight.dtype)


def _near(got: Tensor, exact: Tensor, size: Tensor) -> None:
    """Within a few roundings of the sum of the terms' sizes; the sums are short."""
    assert ((got.double() - exact).abs() <= 8 * torch.finfo(torch.float32).eps * size + 1e-30).all()


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 200),
    width=st.integers(1, 70),
    vocabulary=st.integers(1, 150),
    long=st.sampled_from([0, 0, 0, 1100]),
    first=st.sampled_from([0, 3]),
    add=st.booleans(),
    hidden_type=st.sampled_from([torch.float32, *HALVES]),
    weight_type=st.sampled_from([torch.float32, *HALVES]),
    seed=st.integers(0, 100),
)
def test_equal_float64(
    count: int,
    width: int,
    vocabulary: int,
    long: int,
    first: int,
    add: bool,
    hidden_type: torch.dtype,
    weight_type: torch.dtype,
    seed: int,
) -> None:
    """All three, for any remainder of chunks, panels, vectors and pairs; ``long``: a sum in several parts; ``first``:
    rows that are gathered. Where bfloat16 is multiplied as it is, gradients are rounded to it, and nothing else is."""
    g = torch.Generator().manual_seed(seed)
    width += long
    hidden = torch.randn(count + first, width, generator=g).to(hidden_type)
    weight = torch.randn(vocabulary + 2, width, generator=g).to(weight_type)
    gradient = torch.randn(count, vocabulary + 1, generator=g)[:, 1:]
    is_packed = hidden_type == weight_type and cpu.multiplies(weight_type)
    rounded = (gradient.to(torch.bfloat16) if is_packed else gradient).double()
    products = _products(torch.arange(first, count + first), hidden, weight)
    rows, columns = slice(0, count), slice(2, vocabulary + 2)
    h, w = hidden[first:].double(), weight[2:].double()
    before = 1.0 if add else 0.0

    out = torch.randn(max(count, 16), vocabulary + 3, generator=g)
    around = out[:, vocabulary:].clone()
    start = before * out.double()[:count, :vocabulary]
    products.logits(out[:, :vocabulary], hidden, rows, weight, columns, add=add)
    _near(out[:count, :vocabulary], start + h @ w.t(), start.abs() + h.abs() @ w.abs().t())
    assert torch.equal(out[:, vocabulary:], around)

    out = torch.randn(count, width, generator=g)
    start = out.double()
    products.add_to_rows(out, gradient, weight, columns)
    _near(out, start + rounded @ w, start.abs() + rounded.abs() @ w.abs())

    out = torch.randn(vocabulary, width, generator=g)
    start = before * out.double()
    products.to_weight(out, gradient, hidden, rows, add=add)
    _near(out, start + rounded.t() @ h, start.abs() + rounded.t().abs() @ h.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_on_any_number_of_threads(dtype: torch.dtype, instruction_set: str) -> None:
    if instruction_set == "generic":
        pytest.skip("the BLAS's own business; tests/tuna_kernels/head/test_logprobs.py holds what is asked of it")
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(301, 1201, generator=g).to(dtype), torch.randn(205, 1201, generator=g).to(dtype)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = torch.empty(301, 205)
        _products(torch.arange(301), hidden, weight).logits(
            out, hidden, slice(0, 301), weight, slice(0, 205), add=False
        )
        results.append(out)
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = torch.empty(16, 205)
    _products(torch.tensor([200]), hidden, weight).logits(alone, hidden, slice(0, 1), weight, slice(0, 205), add=False)
    assert torch.equal(alone[0], results[0][200])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row_and_infinity_is_kept(dtype: torch.dtype) -> None:
    hidden, weight = torch.ones(40, 8, dtype=dtype), torch.ones(70, 8, dtype=dtype)
    hidden[7, 3], hidden[8, 2] = torch.nan, torch.inf
    out = torch.empty(40, 70)
    _products(torch.arange(40), hidden, weight).logits(out, hidden, slice(0, 40), weight, slice(0, 70), add=False)
    assert out[7].isnan().all() and out[8].isinf().all()
    assert (out[torch.arange(40)[(torch.arange(40) < 7) | (torch.arange(40) > 8)]] == 8).all()


def test_the_environment_can_ask_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    best = cpu.native().best_instruction_set()
    for name, value in cpu.native().InstructionSet.__members__.items():
        monkeypatch.setenv("TUNA_KERNELS_CPU_ISA", name)
        assert FROM_ENVIRONMENT() == min(best, value, key=int)
    monkeypatch.setenv("TUNA_KERNELS_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="TUNA_KERNELS_CPU_ISA = 'sse9' is not one of"):
        FROM_ENVIRONMENT()
