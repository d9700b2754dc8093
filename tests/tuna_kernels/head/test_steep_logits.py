"""Logits that are large, steep, flat or absent: what their differences are made of, and in what they are summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna_kernels import available_backends, linear_logprobs, selective_logprobs

NATIVE = pytest.param(
    "cpu", marks=pytest.mark.skipif(bool(available_backends()["cpu"]), reason=available_backends()["cpu"])
)
BACKENDS = ["torch", NATIVE]


def evaluate(x: Tensor, targets: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = selective_logprobs(leaf, targets, backend=backend, **options)
    out.sum().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.01, 1e-3, 1e-6, 1e-9, 1e-30, 1e30])
@pytest.mark.parametrize("likeliest", [True, False])
def test_any_temperature(backend: str, dtype: torch.dtype, temperature: float, likeliest: bool) -> None:
    """Log-probs never above 0; the gradient's bound is of its terms, ``1 / temperature``."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 1000, generator=g) * 10).to(dtype)
    targets = x.float().argmax(-1) if likeliest else torch.randint(0, 1000, (64,), generator=g)
    # float64 rounds a logit divided by 1e-9 too: what is true is taken of logits below the largest.
    truth = evaluate(x.double() - x.double().amax(-1, keepdim=True), targets, "reference", temperature=temperature)
    book = evaluate(x, targets, "reference", temperature=temperature)
    got = evaluate(x, targets, backend, temperature=temperature)
    assert bool((got[0] <= 0).all())
    assert_as_good_as_reference(got[0], book[0], truth[0], "log-probs", scale=1.0)
    if 1 / temperature < torch.finfo(dtype).max:
        assert_as_good_as_reference(got[1], book[1], truth[1], "gradient", scale=1 / temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [2e4, -2e4, 1e6])
def test_large_logits_are_as_exact_as_their_differences(backend: str, shift: float) -> None:
    """Adding a number that every logit holds exactly changes no bit of a log-prob and hardly one of its gradient."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(9, 300, generator=g) * 16).round() / 16
    targets = torch.randint(0, 300, (9,), generator=g)
    plain, moved = evaluate(x, targets, backend), evaluate(x + shift, targets, backend)
    assert torch.equal(plain[0], moved[0])
    torch.testing.assert_close(moved[1], plain[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary,peak", [(33_000, 1.1), (128_000, 9.0), (256_000, 8.0), (256_000, 0.0)])
def test_a_long_flat_row_is_summed_in_float64(backend: str, vocabulary: int, peak: float) -> None:
    """Thousands of equal exponentials in a float32 lane: each addition errs the same way."""
    x = torch.zeros(1, vocabulary)
    x[0, 7] = peak
    got = selective_logprobs(x, torch.tensor([7]), backend=backend)
    truth = torch.log_softmax(x.double(), -1)[:, 7]
    assert (got - truth).abs().max() < 2e-6
    ones = torch.ones(1, 1)
    got, lse, entropy = linear_logprobs(
        ones, x.t(), torch.tensor([7]), return_lse=True, return_entropy=True, backend=backend
    )
    p = torch.softmax(x.double(), -1)
    for value, true in ((got, truth), (lse, x.double().logsumexp(-1)), (entropy, -(p * p.log()).sum(-1))):
        assert (value - true).abs().max() < 4e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_is_multiplied_in_float32(backend: str, dtype: torch.dtype) -> None:
    """``h A^T`` is never rounded to the type of h and A; gradients come in the type of each."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    h, w, a, b = draw(64, 256) / 16, draw(1000, 256), draw(8, 256), draw(1000, 8)
    targets = torch.randint(0, 1000, (64,), generator=g)

    def run(backend: str, wide: torch.dtype | None) -> list[Tensor]:
        leaves = [x.to(wide or dtype).clone().requires_grad_() for x in (h, w, a, b)]
        out = linear_logprobs(*leaves[:2], targets, lora=(leaves[2], leaves[3], 0.5), backend=backend)
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    truth, wide, got = run("reference", torch.float64), run(backend, torch.float32), run(backend, None)
    assert (got[0] - truth[0]).abs().max() <= 10 * (wide[0] - truth[0]).abs().max() < 1e-4
    for mine, true in zip(got[1:], truth[1:], strict=True):
        assert mine.dtype == dtype
        assert (mine - true).abs().max() <= 2 * torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("frozen", [False, True])
def test_infinite_and_absent_logits(backend: str, frozen: bool) -> None:
    """-inf: probability 0, a log-prob of -inf, and a gradient like any other's. NaN only where there is no answer."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(3, 4, generator=g), torch.randn(5, 4, generator=g)
    targets = torch.tensor([1, 2, -100])
    mixed, none, too_much = torch.zeros(5), torch.full((5,), -torch.inf), torch.zeros(5)
    mixed[1], too_much[1] = -torch.inf, torch.inf

    def run(bias: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        leaf, weight = h.clone().requires_grad_(), w.clone().requires_grad_(not frozen)
        out = linear_logprobs(leaf, weight, targets, bias=bias, backend=backend, **options)
        assert isinstance(out, Tensor)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        return out.detach(), gradient

    for bias, options in ((mixed, {}), (-mixed, {"logit_scale": -1.0})):
        out, gradient = run(bias, **options)
        assert out[0] == -torch.inf and out[1].isfinite() and out[2] == 0
        p = torch.softmax(options.get("logit_scale", 1.0) * (h @ w.t() + bias), -1)
        slope = options.get("logit_scale", 1.0) * (w[targets[:2]] - p[:2] @ w)
        torch.testing.assert_close(gradient[:2], slope)
        assert not gradient[2].any()
    for bias in (none, too_much):
        out, gradient = run(bias)
        assert out[0].isnan() and not out[1].isfinite() and out[2] == 0
        assert gradient[0].isnan().all() and not gradient[2].any()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_an_ignored_row_may_hold_anything(backend: str) -> None:
    x = torch.randn(3, 7)
    x[1] = torch.nan
    out, gradient = evaluate(x, torch.tensor([1, -100, 2]), backend)
    assert out.isfinite().all() and not gradient[1].any() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_masked_tokens_count_nothing_in_the_entropy(backend: str) -> None:
    h, w, bias = torch.zeros(1, 3, requires_grad=True), torch.randn(8, 3), torch.zeros(8)
    bias[4:] = -torch.inf
    _, entropy = linear_logprobs(h, w, torch.tensor([0]), bias=bias, return_entropy=True, backend=backend)
    torch.testing.assert_close(entropy.detach(), torch.tensor([4.0]).log())
    (gradient,) = torch.autograd.grad(entropy.sum(), h)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["bias", "lora_a", "lora_b"])
def test_one_float64_input_makes_the_whole_call_float64(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (4, 6), "weight": (9, 6), "bias": (9,), "lora_a": (2, 6), "lora_b": (9, 2)}
    x = {
        n: torch.randn(*shape, generator=g).to(torch.float64 if n == name else torch.float32)
        for n, shape in shapes.items()
    }
    options: dict[str, Any] = {"bias": x["bias"], "lora": (x["lora_a"], x["lora_b"], 0.5)}
    got = linear_logprobs(x["hidden"], x["weight"], torch.arange(4), **options)
    z = x["hidden"].double() @ x["weight"].double().t() + x["bias"].double()
    z = z + 0.5 * (x["hidden"].double() @ x["lora_a"].double().t()) @ x["lora_b"].double().t()
    assert isinstance(got, Tensor) and got.dtype == torch.float64
    torch.testing.assert_close(got, z.log_softmax(-1)[torch.arange(4), torch.arange(4)], rtol=1e-13, atol=1e-13)
