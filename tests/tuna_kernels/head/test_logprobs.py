"""linear_logprobs and selective_logprobs equal the float64 oracle, forward and backward, on every backend."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna_kernels import available_backends, linear_logprobs, selective_logprobs
from tuna_kernels.head import cpu, tiled, tiled_linear
from tuna_kernels.head.cpu import multiplies

NATIVE = pytest.param(
    "cpu", marks=pytest.mark.skipif(bool(available_backends()["cpu"]), reason=available_backends()["cpu"])
)
BACKENDS = ["torch", NATIVE]


@dataclass(frozen=True)
class Case:
    """One problem. Targets, rows and upstream are drawn from ``seed``; sharp logits need ``spread`` > 1."""

    slots: int = 70
    tokens: int = 40
    vocabulary: int = 5003  # prime: no tile divides it
    width: int = 24
    hidden: torch.dtype = torch.float32
    weight: torch.dtype = torch.float32
    bias: bool = False
    lora: bool = False
    softcap: float | None = None
    scale: float = 1.0
    entropy: bool = False
    frozen_head: bool = False
    spread: float = 1.0
    shift: float = 0.0
    seed: int = 0


def tensors(case: Case) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(case.seed)
    t, v, d = case.tokens, case.vocabulary, case.width
    leaves = {
        "hidden": (torch.randn(t, d, generator=g) * case.spread).to(case.hidden),
        "weight": (torch.randn(v, d, generator=g)).to(case.weight),
    }
    if case.bias:
        leaves["bias"] = torch.randn(v, generator=g) * 3 + case.shift
    if case.lora:
        leaves["lora_a"] = torch.randn(3, d, generator=g)
        leaves["lora_b"] = torch.randn(v, 3, generator=g)
    targets = torch.randint(0, v, (case.slots,), generator=g)
    rows = torch.randint(0, max(t, 1), (case.slots,), generator=g)
    upstream = torch.randn(3, case.slots, generator=g)
    if case.slots > 8:
        targets[5] = -100
        targets[:2] = torch.tensor([0, v - 1])
        upstream[:, rows == rows[7]] = 0  # a whole row without upstream
        upstream[0, 8] = 0  # one slot without
    return leaves, targets, rows, upstream


def evaluate(case: Case, backend: str, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Values and gradients of every output, with a random upstream of its own for every slot."""
    leaves, targets, rows, upstream = tensors(case)
    leaves = {k: x.to(device=device, dtype=dtype) for k, x in leaves.items()}
    targets, rows, upstream = targets.to(device), rows.to(device), upstream.to(device)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == "hidden" or not case.frozen_head)
    lora = (leaves["lora_a"], leaves["lora_b"], 0.5) if case.lora else None
    out = linear_logprobs(
        leaves["hidden"],
        leaves["weight"],
        targets,
        rows=rows,
        bias=leaves.get("bias"),
        lora=lora,
        logit_scale=case.scale,
        softcap=case.softcap,
        return_lse=True,
        return_entropy=case.entropy,
        backend=backend,
    )
    sum((o * u).sum() for o, u in zip(out, upstream, strict=False)).backward()
    results = dict(zip(("logprobs", "lse", "entropy"), (o.detach().cpu() for o in out), strict=False))
    return results | {f"d {k}": x.grad.cpu() for k, x in leaves.items() if x.grad is not None}


def check(case: Case, backend: str, **slack: float) -> None:
    """Where products take bfloat16 as it is, gradients of logits are rounded to it first, once."""
    types = {case.hidden, case.weight}
    rounded = case.weight if backend == "cpu" and len(types) == 1 and multiplies(case.weight) else torch.float32
    truth = evaluate(case, "reference", torch.float64)
    reference = evaluate(case, "reference")
    got = evaluate(case, backend)
    assert got.keys() == truth.keys()
    for name in truth:
        where = f"{name} of {case} on {backend}"
        assert_as_good_as_reference(
            got[name],
            reference[name],
            truth[name],
            where,
            rounded=rounded if name.startswith("d ") else torch.float32,
            **slack,
        )


VARIANTS = [
    Case(),
    Case(bias=True),
    Case(lora=True),
    Case(entropy=True),
    Case(frozen_head=True),
    Case(softcap=5.0, scale=0.7),
    Case(softcap=5.0, frozen_head=True, bias=True, scale=1.3),
    Case(softcap=30.0, bias=True, lora=True, entropy=True, scale=0.5),
    Case(frozen_head=True, lora=True),
    Case(spread=20.0),  # peaked: nearly all mass on one token
    Case(spread=20.0, entropy=True, bias=True),
    Case(spread=0.0),  # flat
    Case(bias=True, shift=-500.0),  # all logits far below zero: a tail of zeros would win
    Case(bias=True, shift=500.0),
    Case(bias=True, shift=2e4),  # log-sum-exp itself is off by 1e-3 in float32
    Case(bias=True, shift=-2e4, entropy=True),
    Case(bias=True, shift=2e4, frozen_head=True),
    Case(scale=100.0),  # steep: a fused multiply-add sees the largest logit other than it was rounded
    Case(scale=1e4, frozen_head=True),
    Case(scale=-50.0, bias=True, lora=True, entropy=True),
    Case(scale=-50.0, frozen_head=True),
    Case(scale=1e-3, bias=True),
    Case(scale=0.0, entropy=True),
    Case(scale=100.0, softcap=5.0, bias=True),  # saturated
    Case(scale=-3.0, softcap=1000.0, frozen_head=True),
]
DTYPES = list(itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_equals_the_oracle(case: Case, backend: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden,weight", DTYPES[1:], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_pair_of_types(hidden: torch.dtype, weight: torch.dtype, frozen: bool, backend: str) -> None:
    check(Case(hidden=hidden, weight=weight, frozen_head=frozen, bias=True, vocabulary=2600), backend)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_packed_and_converted(packed: bool, lora: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to multiply bfloat16, several chunks of rows and tiles; the log-probs of both are float32's."""
    if packed and not multiplies(torch.bfloat16):
        pytest.skip("this processor has no AVX512_BF16")
    if not packed:
        monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)
    half = torch.bfloat16
    case = Case(
        slots=1300, tokens=1200, hidden=half, weight=half, lora=lora, frozen_head=frozen, entropy=True, width=37
    )
    check(case, "cpu")
    exact = evaluate(case, "reference", torch.float64)["logprobs"]
    assert (evaluate(case, "cpu")["logprobs"] - exact).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(backend: str, data: st.DataObject) -> None:
    case = Case(
        slots=data.draw(st.integers(0, 60)),
        tokens=data.draw(st.integers(1, 50)),
        vocabulary=data.draw(st.sampled_from([1, 2, 7, 97, 256, 2047, 2048, 2049, 4097])),
        width=data.draw(st.integers(1, 40)),
        bias=data.draw(st.booleans()),
        entropy=data.draw(st.booleans()),
        softcap=data.draw(st.sampled_from([None, 2.0, 30.0])),
        frozen_head=data.draw(st.booleans()),
        hidden=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        weight=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=data.draw(st.integers(0, 1000)),
    )
    check(case, backend, units=64, scale=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_chunk_and_more_columns_than_a_tile(backend: str) -> None:
    plan = tiled.TilePlan.choose(8, converts=False)
    check(Case(slots=plan.rows + 300, tokens=plan.rows + 200, vocabulary=plan.columns + 5, width=8), backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 5, generator=g, dtype=torch.float64, requires_grad=True) for n in (12, 11))
    b = torch.randn(11, generator=g, dtype=torch.float64, requires_grad=True)
    targets, rows = torch.randint(0, 11, (20,), generator=g), torch.randint(0, 12, (20,), generator=g)

    def trainable(h: Tensor, w: Tensor, b: Tensor) -> Any:
        options: dict[str, Any] = {"return_lse": True, "return_entropy": True, "backend": backend}
        return linear_logprobs(h, w, targets, rows=rows, bias=b, softcap=2.0, logit_scale=0.8, **options)

    def frozen(h: Tensor) -> Any:
        return linear_logprobs(h, w.detach(), targets, rows=rows, softcap=2.0, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(trainable, (h, w, b))
    assert torch.autograd.gradcheck(frozen, (h,))
    assert torch.autograd.gradcheck(
        lambda x: selective_logprobs(x, targets[:12] % 5, temperature=0.7, backend=backend), (h,)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_backward_with_another_upstream(backend: str, frozen: bool) -> None:
    """Peers that scale saved gradients in place give a wrong second one."""
    leaves, targets, rows, upstream = tensors(Case())
    h, w = leaves["hidden"].requires_grad_(), leaves["weight"].requires_grad_(not frozen)
    out = linear_logprobs(h, w, targets, rows=rows, backend=backend)
    wanted = (h,) if frozen else (h, w)
    first = torch.autograd.grad((out * upstream[0]).sum(), wanted, retain_graph=True)
    second = torch.autograd.grad((out * upstream[1]).sum(), wanted, retain_graph=True)
    again = torch.autograd.grad((out * upstream[0]).sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_upstream_and_strided_inputs(backend: str) -> None:
    """``sum().backward()`` hands over a stride-0 gradient; weights may be slices or transposed."""
    g = torch.Generator().manual_seed(0)
    big = torch.randn(60, 64, generator=g)
    hidden, targets = torch.randn(9, 64, generator=g)[:, ::2], torch.randint(0, 30, (9,), generator=g)
    for weight in (big[::2, :32], big[:32, :30].t(), big[:30, :64:2]):
        leaf, same = weight.detach().requires_grad_(), weight.detach().clone().contiguous().requires_grad_()
        h = hidden.detach().requires_grad_()
        linear_logprobs(h, leaf, targets, backend=backend).sum().backward()
        linear_logprobs(hidden.contiguous(), same, targets, backend="reference").sum().backward()
        torch.testing.assert_close(leaf.grad, same.grad)


@pytest.mark.skipif(bool(available_backends()["cpu"]), reason=available_backends()["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 576])
def test_a_rows_bits_do_not_depend_on_the_batch(dtype: torch.dtype, width: int) -> None:
    if not cpu.has_products(dtype):
        pytest.skip("the BLAS multiplies: which bits a row gets beside others is its own business (docs/numerics.md)")
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(1300, width, generator=g).to(dtype),
        torch.randn(5003, width, generator=g).to(dtype),
    )
    targets = torch.randint(0, 5003, (1300,), generator=g)
    whole = linear_logprobs(hidden, weight, targets, backend="cpu")
    for start, stop in [(0, 1), (0, 2), (3, 4), (1, 14), (7, 24), (100, 133), (1000, 1300), (1299, 1300)]:
        part = linear_logprobs(hidden[start:stop], weight, targets[start:stop], backend="cpu")
        assert torch.equal(part, whole[start:stop]), (start, stop)
    rows = torch.tensor([5, 5, 5, 900, 0])
    assert torch.equal(linear_logprobs(hidden, weight, targets[rows], rows=rows, backend="cpu"), whole[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_needs_no_gradient_gets_none_and_no_product(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tiled_linear.Gradients] = []
    inner = tiled.backward
    monkeypatch.setattr(tiled, "backward", lambda *a, **k: (passes.append(a[6]), inner(*a, **k)))
    leaves, targets, rows, _ = tensors(Case())
    h, w = leaves["hidden"], leaves["weight"].requires_grad_()
    linear_logprobs(h, w, targets, rows=rows, backend=backend).sum().backward()
    assert passes[-1].rows is None and passes[-1].weight is not None
    linear_logprobs(h.requires_grad_(), w.detach(), targets, rows=rows, backend=backend).sum().backward()
    assert len(passes) == 1, "a frozen head keeps the unit gradient: the backward walks no tile"


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_upstream_take_no_part_in_the_backward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    inner = tiled.backward
    monkeypatch.setattr(tiled, "backward", lambda *a, **k: (seen.append(a[3].rows.numel()), inner(*a, **k)))
    leaves, targets, _, _ = tensors(Case(slots=40))
    h, w = leaves["hidden"].requires_grad_(), leaves["weight"].requires_grad_()
    upstream = torch.zeros(40)
    upstream[[3, 17]] = 1.0
    linear_logprobs(h, w, targets, backend=backend).backward(upstream)
    assert seen == [2]
    # Two slots of one row that cancel in sum still have a gradient.
    rows, pair = torch.tensor([4, 4]), torch.tensor([1, 2])
    logprobs = linear_logprobs(h, w, pair, rows=rows, backend=backend)
    (gradient,) = torch.autograd.grad(logprobs, h, torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(gradient[4], (w[1] - w[2]).detach())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_degenerate_sizes(backend: str) -> None:
    w = torch.randn(7, 3, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    h = torch.randn(0, 3, requires_grad=True)
    linear_logprobs(h, w, none, backend=backend).sum().backward()
    assert w.grad is not None and not w.grad.any()
    h = torch.randn(3, 3, requires_grad=True)
    ignored = linear_logprobs(h, w, torch.full((3,), -100), backend=backend)
    ignored.sum().backward()
    assert not ignored.any() and h.grad is not None and not h.grad.any() and not w.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_minus_infinity_masks_a_token(backend: str) -> None:
    h, w = torch.randn(20, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    bias = torch.zeros(50)
    bias[40:] = -torch.inf
    targets = torch.arange(20)
    got = linear_logprobs(h, w, targets, bias=bias, return_entropy=True, backend=backend)
    cut = linear_logprobs(h, w[:40], targets, return_entropy=True, backend="reference")
    for a, b in zip(got, cut, strict=True):
        torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(sum(x.sum() for x in got), (h, w), retain_graph=True)
    expected = torch.autograd.grad(sum(x.sum() for x in cut), (h, w))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan_stays_nan(backend: str) -> None:
    h, w = torch.randn(3, 4), torch.randn(50, 4)
    h[1, 2] = torch.nan
    out = linear_logprobs(h, w, torch.tensor([1, 2, 3]), backend=backend)
    assert out.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_unvalidated_target_out_of_range_gives_nan(backend: str) -> None:
    out = linear_logprobs(torch.randn(2, 4), torch.randn(9, 4), torch.tensor([9, 3]), validate=False, backend=backend)
    assert out.isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float32_alone(backend: str) -> None:
    leaves, targets, rows, _ = tensors(Case(hidden=torch.bfloat16))
    h, w = leaves["hidden"].requires_grad_(), leaves["weight"].requires_grad_()
    outside = linear_logprobs(h, w, targets, rows=rows, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logprobs(h, w, targets, rows=rows, backend=backend)
        gradient = torch.autograd.grad(inside.sum(), (h, w))
    assert torch.equal(inside, outside) and inside.dtype == torch.float32
    assert [g.dtype for g in gradient] == [torch.bfloat16, torch.float32]
    for a, b in zip(gradient, torch.autograd.grad(outside.sum(), (h, w)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_selective_equals_the_oracle(backend: str, dtype: torch.dtype, temperature: float) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the native code computes in float32")
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 13, 1009, generator=g) * 8).to(dtype)
    targets = torch.randint(0, 1009, (4, 13), generator=g)
    targets[2, 3] = -100
    upstream = torch.randn(4, 13, generator=g)

    def evaluate(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone().requires_grad_()
        out = selective_logprobs(leaf, targets, temperature=temperature, backend=backend)
        out.backward(upstream.to(out.dtype))
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    truth = evaluate(logits.double(), "reference")
    reference = evaluate(logits, "reference")
    for got, book, true in zip(evaluate(logits, backend), reference, truth, strict=True):
        assert_as_good_as_reference(got, book, true)


def test_selective_handles_strided_and_empty_logits() -> None:
    base = torch.randn(6, 40, 3)
    logits = base.transpose(1, 2)  # the vocabulary is not the dense axis
    targets = torch.randint(0, 40, (6, 3))
    torch.testing.assert_close(
        selective_logprobs(logits, targets), selective_logprobs(logits, targets, backend="reference")
    )
    assert selective_logprobs(torch.randn(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_numbers_beyond_32_bits() -> None:
    """Row offsets past 2**31 elements: a tiny storage with a huge stride."""
    stride = 2**31 // 8 + 64
    try:
        storage = torch.empty(stride * 9, dtype=torch.bfloat16)  # virtual: only touched pages are real
    except RuntimeError:
        pytest.skip("this machine does not lend 5 GB of virtual memory")
    hidden = storage.as_strided((9, 4), (stride, 1))
    hidden.copy_(torch.randn(9, 4))
    weight, targets = torch.randn(31, 4), torch.arange(9)
    for backend in ("torch", *([] if available_backends()["cpu"] else ["cpu"])):
        got = linear_logprobs(hidden, weight, targets, backend=backend)
        torch.testing.assert_close(got, linear_logprobs(hidden.clone(), weight, targets, backend="reference"))


GOOD: dict[str, Any] = {
    "hidden": torch.zeros(4, 3),
    "weight": torch.zeros(7, 3),
    "targets": torch.tensor([0, 1, 2, 3]),
}
BAD = [
    ({"targets": torch.tensor([0, 1, 7, 2])}, IndexError, r"targets\[2\] = 7 is outside the vocabulary of 7"),
    ({"targets": torch.tensor([0, -1, 0, 0])}, IndexError, r"targets\[1\] = -1"),
    ({"rows": torch.tensor([0, 1, 4, 0])}, IndexError, r"rows\[2\] = 4 is outside the rows of hidden of 4"),
    ({"rows": torch.tensor([0, 1])}, ValueError, "rows"),
    ({"targets": torch.tensor([0, 1])}, ValueError, "without rows"),
    ({"targets": torch.zeros(4)}, TypeError, "targets must be int64"),
    ({"targets": torch.zeros(4, dtype=torch.int32)}, TypeError, "int32"),
    ({"weight": torch.zeros(7, 4)}, ValueError, r"\[7, 4\]"),
    ({"weight": torch.zeros(0)}, ValueError, "ZeRO-3"),
    ({"weight": torch.zeros(7, 3, dtype=torch.int64)}, TypeError, "weight"),
    ({"bias": torch.zeros(3)}, ValueError, "bias"),
    ({"lora": (torch.zeros(2, 4), torch.zeros(7, 2), 1.0)}, ValueError, "lora"),
    ({"softcap": 0.0}, ValueError, "softcap"),
    ({"softcap": 1e-50}, ValueError, "softcap = 1e-50"),
    ({"softcap": float("inf")}, ValueError, "softcap = inf"),
    ({"logit_scale": float("nan")}, ValueError, "logit_scale"),
    ({"logit_scale": 1e40}, ValueError, "logit_scale = 1e"),
    ({"bias": torch.zeros(7).double(), "backend": "cpu"}, RuntimeError, "float64"),
    ({"backend": "cuda12"}, ValueError, "cuda12"),
    ({"hidden": torch.zeros(4, 3).double(), "backend": "cpu"}, RuntimeError, "float64"),
    ({"hidden": torch.zeros(4, 3, device="meta")}, ValueError, "meta"),
]


@pytest.mark.parametrize("change,error,message", BAD, ids=lambda x: str(x)[:30])
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    if change.get("backend") == "cpu" and available_backends()["cpu"]:
        pytest.skip(available_backends()["cpu"])
    arguments = GOOD | change
    with pytest.raises(error, match=message):
        linear_logprobs(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


def test_selective_bad_input_is_named() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(IndexError, match=r"targets\[1\] = 5"):
        selective_logprobs(logits, torch.tensor([0, 5]))
    for temperature in (0, -1.0, float("nan"), float("inf"), 1e-300):
        with pytest.raises(ValueError, match=f"temperature = {temperature}"):
            selective_logprobs(logits, torch.tensor([0, 1]), temperature=temperature)
    with pytest.raises(ValueError, match="targets"):
        selective_logprobs(logits, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match="logits"):
        selective_logprobs(logits.long(), torch.tensor([0, 1]))


@pytest.mark.parametrize("case", [Case(), Case(frozen_head=True)], ids=str)
def test_no_full_logits_are_held(case: Case) -> None:
    """The largest block any operation allocates is a tile, not rows times vocabulary."""
    case = replace(case, slots=600, tokens=600, vocabulary=40_000, width=8)
    leaves, targets, rows, _ = tensors(case)
    h, w = leaves["hidden"].requires_grad_(), leaves["weight"].requires_grad_(not case.frozen_head)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_logprobs(h, w, targets, rows=rows).sum().backward()
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    assert 0 < largest < 600 * 40_000 * 4 / 8
