"""linear_logprobs on Triton kernels equals the float64 oracle, forward and backward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton.device import DEVICE
from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tests.tuna_kernels.head.test_logprobs import VARIANTS, Case, evaluate, tensors
from tuna_kernels import linear_logprobs, workspace_bytes
from tuna_kernels.gpu import launch
from tuna_kernels.gpu.static_case import Config
from tuna_kernels.head.triton import forward as head_forward
from tuna_kernels.head.triton import launches, slabs

HALF = (torch.bfloat16, torch.float16)


def rounded(case: Case) -> torch.dtype:
    """The type in which gradients of logits are multiplied."""
    return case.hidden if case.hidden == case.weight else torch.float32


def check(case: Case, scale: float = 0.0) -> None:
    truth = evaluate(case, "reference", torch.float64)
    reference = evaluate(case, "reference")
    got = evaluate(case, "triton", device=DEVICE)
    assert got.keys() == truth.keys()
    for name in truth:
        is_gradient = name.startswith("d ")
        assert_as_good_as_reference(
            got[name], reference[name], truth[name], f"{name} of {case}",
            rounded=rounded(case) if is_gradient else torch.float32, scale=scale,
        )  # fmt: skip


SMALL = Case(slots=40, tokens=23, vocabulary=397, width=40)  # two row blocks, seven tiles, four splits, a tail each way


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the interpreter's tile: large ones for large vocabularies."""

    def setter(**blocks: int) -> None:
        configs = (Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 2} | blocks),)
        for table in (head_forward.CONFIGS_16, head_forward.RICH_16, head_forward.CONFIGS_32):
            monkeypatch.setitem(table, launch.INTERPRETER, configs)

    return setter


@pytest.mark.parametrize("case", [replace(c, slots=40, tokens=23, vocabulary=397, width=40) for c in VARIANTS], ids=str)
def test_equals_the_oracle(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("hidden,weight", list(itertools.product([torch.float32, *HALF], repeat=2))[1:], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_pair_of_types(hidden: torch.dtype, weight: torch.dtype, frozen: bool) -> None:
    case = replace(SMALL, hidden=hidden, weight=weight, frozen_head=frozen, slots=20, tokens=12, vocabulary=130)
    check(replace(case, bias=True, lora=not frozen, entropy=not frozen, softcap=9.0))


@pytest.mark.parametrize("dtype", HALF)
def test_unit_gradients_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen heads wide enough for them to pay; peaked ones too, where the gradient is a small difference."""
    monkeypatch.setattr("tuna_kernels.head.logprobs.unit_gradient_pays", lambda *_: True)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)  # as many slabs as can be
    monkeypatch.setattr(slabs, "MIN_COLUMNS", 100)
    for spread in (1.0, 20.0):
        check(replace(SMALL, hidden=dtype, weight=dtype, frozen_head=True, spread=spread, bias=True, softcap=50.0))


@pytest.mark.parametrize("vocabulary,dtype", [(97, torch.float32), (32000, torch.bfloat16), (128257, torch.float32)])
@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_vocabularies(vocabulary: int, dtype: torch.dtype, spread: float, tile: Callable[..., None]) -> None:
    """Flat and peaked, all logits far below zero: a phantom column beyond the vocabulary would win."""
    tile(BLOCK_M=16, BLOCK_N=64 if vocabulary < 1000 else 4096, BLOCK_K=16)
    case = Case(slots=9, tokens=5, vocabulary=vocabulary, width=6, hidden=dtype, weight=dtype, bias=True, entropy=True)
    check(replace(case, spread=spread, shift=-300.0))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    frozen = data.draw(st.booleans())
    check(
        Case(
            slots=data.draw(st.integers(0, 40)),
            tokens=data.draw(st.integers(1, 35)),
            vocabulary=data.draw(st.sampled_from([2, 7, 63, 64, 65, 129])),
            width=data.draw(st.sampled_from([1, 15, 31, 32, 33, 70])),
            bias=data.draw(st.booleans()),
            lora=not frozen and data.draw(st.booleans()),
            entropy=data.draw(st.booleans()),
            softcap=data.draw(st.sampled_from([None, 30.0])),
            frozen_head=frozen,
            hidden=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
            seed=data.draw(st.integers(0, 1000)),
        ),
        scale=1.0,
    )


def test_slabs_and_column_blocks_change_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slab narrower than the vocabulary, its last one ragged."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)
    monkeypatch.setattr(slabs, "MIN_COLUMNS", 100)
    assert slabs.slab_columns(23, 397, 4) == 100
    check(replace(SMALL, bias=True, entropy=True, lora=True))
    check(replace(SMALL, hidden=torch.bfloat16, weight=torch.bfloat16, bias=True))


def test_stated_workspace_bounds_what_is_allocated() -> None:
    """Peak of forward and backward beyond inputs and results; one slab, as everything here fits one."""
    rows, width, vocabulary = 60, 32, 700
    shape = {"rows": rows, "width": width, "vocabulary": vocabulary}
    stated = workspace_bytes("linear_logprobs", shape, torch.float32, backend="triton")
    h, w = (torch.randn(n, width, device=DEVICE, requires_grad=True) for n in (rows, vocabulary))
    with torch.profiler.profile(profile_memory=True) as profile:
        out = linear_logprobs(h, w, torch.zeros(rows, dtype=torch.int64, device=DEVICE), backend="triton")
        assert isinstance(out, Tensor)
        out.sum().backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]" and event.device_type().name == ("CPU" if DEVICE == "cpu" else "CUDA"):
            now += event.nbytes()
            peak = max(peak, now)
    results = 4 * (rows * width + vocabulary * width)
    assert 0 < peak - results <= 1.1 * stated


def test_splits_are_merged_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than one step of `finish_kernel` takes: the running sums are rescaled to each new maximum."""
    monkeypatch.setattr(head_forward, "FINISH", Config({"BLOCK_M": 32, "SPLITS": 2}))
    check(replace(SMALL, entropy=True, spread=3.0))


def test_slab_columns_keep_the_budget() -> None:
    for rows, itemsize in ((1, 2), (8192, 2), (100_000, 2), (8192, 4)):
        columns = slabs.slab_columns(rows, 128257, itemsize)
        assert rows * columns * itemsize <= max(slabs.SLAB_BYTES, rows * slabs.MIN_COLUMNS * itemsize)
        assert columns == 128257 or columns % slabs.MIN_COLUMNS == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Alone, elsewhere in a batch, with other slots beside it: tiles and splits depend on the head only."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 40, generator=g).to(DEVICE, dtype) for n in (50, 397))
    targets = torch.randint(0, 397, (50,), generator=g).to(DEVICE)
    options: dict[str, Any] = {"return_lse": True, "return_entropy": True, "backend": "triton"}
    whole = linear_logprobs(hidden, weight, targets, **options)
    for start, stop in ((0, 1), (3, 5), (15, 50)):
        part = linear_logprobs(hidden[start:stop], weight, targets[start:stop], **options)
        assert all(torch.equal(p, w[start:stop]) for p, w in zip(part, whole, strict=True))
    rows = torch.tensor([5, 5, 5, 49, 0], device=DEVICE)
    again = linear_logprobs(hidden, weight, targets[rows], rows=rows, **options)
    assert all(torch.equal(a, w[rows]) for a, w in zip(again, whole, strict=True))


def test_splits_fill_the_gpu_whatever_the_rows() -> None:
    """At least one split a multiprocessor where there are that many tiles, never more than twice that many partials."""
    for tiles, num_sms in ((1, 132), (250, 132), (1003, 132), (1003, 108), (3, 4), (2000, 132)):
        per_split = head_forward.tiles_per_split(tiles, num_sms)
        splits = math.ceil(tiles / per_split)
        assert splits >= min(tiles, num_sms) and 1 <= per_split <= 8


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_backward_with_another_upstream(frozen: bool) -> None:
    leaves, targets, rows, upstream = tensors(SMALL)
    h, w = leaves["hidden"].to(DEVICE).requires_grad_(), leaves["weight"].to(DEVICE).requires_grad_(not frozen)
    upstream = upstream.to(DEVICE)
    out = linear_logprobs(h, w, targets.to(DEVICE), rows=rows.to(DEVICE), backend="triton")
    assert isinstance(out, Tensor)
    wanted = (h,) if frozen else (h, w)
    first = torch.autograd.grad((out * upstream[0]).sum(), wanted, retain_graph=True)
    second = torch.autograd.grad((out * upstream[1]).sum(), wanted, retain_graph=True)
    again = torch.autograd.grad((out * upstream[0]).sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_expanded_upstream_and_strided_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    big = torch.randn(60, 64, generator=g).to(DEVICE)
    hidden = torch.randn(9, 64, generator=g).to(DEVICE)[:, ::2]
    targets = torch.randint(0, 30, (9,), generator=g).to(DEVICE)
    one = torch.randn(32, generator=g).to(DEVICE)
    for states, weight in (
        (hidden, big[::2, :32]),
        (hidden, big[:32, :30].t()),
        (hidden, big[:30, :64:2]),
        (one.expand(9, 32), big[:30, 3:35]),  # every row the same storage; rows not aligned
    ):
        results = []
        for h, w, backend in ((states, weight, "triton"), (states.contiguous(), weight.contiguous(), "reference")):
            h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
            out = linear_logprobs(h, w, targets, backend=backend)
            assert isinstance(out, Tensor)
            out.sum().backward()  # hands over an expanded gradient
            results.append((out.detach(), h.grad, w.grad))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_nothing_to_do() -> None:
    w = torch.randn(7, 3, device=DEVICE, requires_grad=True)
    for h, targets in (
        (torch.randn(0, 3, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)),
        (torch.randn(3, 3, device=DEVICE), torch.full((3,), -100, device=DEVICE)),
    ):
        for head_wanted in (True, False):
            h = h.detach().requires_grad_()
            weight = w if head_wanted else w.detach()
            out = linear_logprobs(h, weight, targets, return_lse=True, return_entropy=head_wanted, backend="triton")
            sum(x.sum() for x in out).backward()
            assert all(not x.any() for x in out) and h.grad is not None and not h.grad.any()
    assert w.grad is not None and not w.grad.any()


def test_two_slots_of_a_row_that_cancel_still_have_a_gradient() -> None:
    h = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    w = torch.randn(70, 8, device=DEVICE, requires_grad=True)
    rows, pair = torch.tensor([4, 4], device=DEVICE), torch.tensor([1, 66], device=DEVICE)
    logprobs = linear_logprobs(h, w, pair, rows=rows, backend="triton")
    assert isinstance(logprobs, Tensor)
    (gradient,) = torch.autograd.grad(logprobs, h, torch.tensor([1.0, -1.0], device=DEVICE))
    torch.testing.assert_close(gradient[4], (w[1] - w[66]).detach())
    assert not gradient[:4].any()


def test_rows_without_upstream_take_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    inner = launches.launch_gradient
    monkeypatch.setattr(launches, "launch_gradient", lambda *a, **k: (seen.append(a[4].shape[0]), inner(*a, **k))[1])
    h, w = torch.randn(40, 8, device=DEVICE, requires_grad=True), torch.randn(70, 8, device=DEVICE, requires_grad=True)
    upstream = torch.zeros(40, device=DEVICE)
    upstream[[3, 17]] = 1.0
    out = linear_logprobs(h, w, torch.arange(40, device=DEVICE), backend="triton")
    assert isinstance(out, Tensor)
    out.backward(upstream)
    assert seen == [2]


def test_what_needs_no_gradient_gets_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    inner = launches.multiply
    monkeypatch.setattr(
        launches, "multiply", lambda out, *a, **k: (shapes.append(tuple(out.shape)), inner(out, *a, **k))[1]
    )
    monkeypatch.setattr("tuna_kernels.head.logprobs.unit_gradient_pays", lambda *_: False)
    targets = torch.arange(5, device=DEVICE)
    for of_hidden, of_weight, expected in ((True, False, [(5, 8)]), (False, True, [(70, 8)])):
        h = torch.randn(5, 8, device=DEVICE, requires_grad=of_hidden)
        w = torch.randn(70, 8, device=DEVICE, requires_grad=of_weight)
        shapes.clear()
        out = linear_logprobs(h, w, targets, backend="triton")
        assert isinstance(out, Tensor) and not shapes, "the forward keeps no logits"
        out.sum().backward()
        assert shapes == expected


@pytest.mark.parametrize("target", [70, 127, 128, -5, 2**40])
def test_a_target_outside_the_vocabulary_gives_nan(target: int) -> None:
    """Also one whose column a tile pads, and one that 32 bits would wrap."""
    targets = torch.tensor([target, 3], device=DEVICE)
    h, w = torch.randn(2, 8, device=DEVICE), torch.randn(70, 8, device=DEVICE)
    out = linear_logprobs(h, w, targets, validate=False, backend="triton")
    assert isinstance(out, Tensor) and out.isnan().tolist() == [True, False]


def test_nan_stays_in_its_row_and_minus_infinity_masks() -> None:
    h, w = torch.randn(3, 8, device=DEVICE), torch.randn(150, 8, device=DEVICE)
    bad = h.clone()
    bad[1, 2] = torch.nan
    out = linear_logprobs(bad, w, torch.tensor([1, 2, 3], device=DEVICE), backend="triton")
    assert isinstance(out, Tensor) and out.isnan().tolist() == [False, True, False]
    bias = torch.zeros(150, device=DEVICE)
    bias[:64] = -torch.inf  # a whole tile, the first
    bias[140:] = -torch.inf
    targets = torch.tensor([64, 139, 100], device=DEVICE)
    results = []
    for weight, b, t, backend in ((w, bias, targets, "triton"), (w[64:140], None, targets - 64, "reference")):
        leaf, kept = h.detach().requires_grad_(), weight.detach().requires_grad_()
        got = linear_logprobs(leaf, kept, t, bias=b, return_entropy=True, backend=backend)
        sum(x.sum() for x in got).backward()
        results.append((*(x.detach() for x in got), leaf.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_offsets_beyond_32_bits() -> None:
    """Rows of hidden and head, and of the slab, that start past 2**31 elements."""
    stride = 2**31 // 8 + 64
    try:
        storage = torch.empty(stride * 9, dtype=torch.bfloat16, device=DEVICE)  # virtual: only touched pages are real
    except RuntimeError:
        pytest.skip("5 GB of memory are not to be had")
    wide = storage.as_strided((9, 4), (stride, 1))
    wide.copy_(torch.randn(9, 4))
    small, targets = torch.randn(9, 4, device=DEVICE).bfloat16(), torch.arange(9, device=DEVICE) % 5
    for hidden, weight in ((wide, small), (small, wide)):
        results = []
        for h, w, backend in ((hidden, weight, "triton"), (hidden.clone(), weight.clone(), "reference")):
            leaf = h.detach().requires_grad_()
            out = linear_logprobs(leaf, w.detach(), targets, return_lse=True, backend=backend)
            out[0].sum().backward()
            results.append((out[0].detach(), leaf.grad))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-2 if got.dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulates_into_a_main_grad(dtype: torch.dtype) -> None:
    """Twice, with a bias and an adapter of ordinary gradients beside it; weight.grad is left alone."""
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 24, generator=g).to(DEVICE, dtype).requires_grad_() for n in (20, 150))
    b = torch.randn(150, generator=g).to(DEVICE).requires_grad_()
    lora_b = torch.randn(150, 3, generator=g).to(DEVICE).requires_grad_()
    lora = (torch.randn(3, 24, generator=g).to(DEVICE), lora_b, 0.5)
    targets = torch.randint(0, 150, (20,), generator=g).to(DEVICE)
    plain = linear_logprobs(h, w, targets, bias=b, lora=lora, backend="triton")
    assert isinstance(plain, Tensor)
    plain.sum().backward()
    expected = {n: t.grad.clone() for n, t in (("w", w), ("b", b), ("lora", lora_b), ("h", h)) if t.grad is not None}
    h.grad = w.grad = b.grad = lora_b.grad = None
    main_grad = torch.ones(150, 24, device=DEVICE)
    for _ in range(2):
        out = linear_logprobs(h, w, targets, bias=b, lora=lora, accumulate_into=main_grad, backend="triton")
        assert isinstance(out, Tensor)
        out.sum().backward()
    assert w.grad is None and b.grad is not None and h.grad is not None and lora_b.grad is not None
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(main_grad - 1, 2 * expected["w"].float(), atol=tolerance, rtol=tolerance)
    for got, name in ((b.grad, "b"), (h.grad, "h"), (lora_b.grad, "lora")):
        torch.testing.assert_close(got, 2 * expected[name], atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_filter_keeps_its_bound_and_leaves_something_out(dtype: torch.dtype, accumulate: bool) -> None:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(20, 24, generator=g).to(DEVICE, dtype)
    w = torch.randn(300, 24, generator=g).to(DEVICE, dtype)
    targets = torch.randint(0, 30, (20,), generator=g).to(DEVICE)
    upstream = torch.randn(20, generator=g).to(DEVICE) * 1e-3

    def gradients(eps: float) -> tuple[Tensor, Tensor]:
        a, b = h.detach().requires_grad_(), w.detach().requires_grad_()
        into = torch.zeros(300, 24, device=DEVICE) if accumulate else None
        out = linear_logprobs(a, b, targets, filter_eps=eps, accumulate_into=into, backend="triton")
        assert isinstance(out, Tensor)
        out.backward(upstream)
        of_weight = into if into is not None else b.grad
        assert a.grad is not None and of_weight is not None
        return a.grad.float(), of_weight.float()

    eps = 2e-5
    (exact_h, exact_w), (filtered_h, filtered_w) = gradients(0.0), gradients(eps)
    left_out = (filtered_w == 0).all(1) & (exact_w != 0).any(1)
    assert 30 < left_out.sum() < 290
    slack = 1e-3 * exact_w.abs().max()
    assert (filtered_w[~left_out] - exact_w[~left_out]).abs().max() <= slack
    assert (exact_w[left_out].norm(dim=1) <= eps * h.float().norm(dim=1).sum() + slack).all()
    bound = eps * w[left_out].float().norm(dim=1).sum()
    difference = (filtered_h - exact_h).norm(dim=1)
    assert 0 < difference.max() <= bound + slack


def test_upstream_far_below_float16_is_not_lost() -> None:
    """A gradient of logits that float16 flushes to zero; its products with hidden states are large enough."""
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 24, generator=g).to(DEVICE).half() for n in (20, 150))
    targets = torch.randint(0, 150, (20,), generator=g).to(DEVICE)
    main_grad = torch.zeros(150, 24, device=DEVICE)
    leaf = w.clone().requires_grad_()
    out = linear_logprobs(h, leaf, targets, accumulate_into=main_grad, backend="triton")
    assert isinstance(out, Tensor)
    out.backward(torch.full_like(out, 1e-8))
    reference = w.double().requires_grad_()
    linear_logprobs(h.double(), reference, targets, backend="reference").sum().backward()  # type: ignore[union-attr]
    assert reference.grad is not None
    torch.testing.assert_close(main_grad.double() * 1e8, reference.grad, atol=5e-3, rtol=5e-3)
