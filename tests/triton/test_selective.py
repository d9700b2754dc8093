"""selective_logprobs on Triton kernels equals the float64 oracle; the gradient may overwrite the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.triton.device import DEVICE
from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna_kernels import selective_logprobs
from tuna_kernels.head.triton import logits as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature,shift", [(1.0, 0.0), (0.6, -400.0)])
@pytest.mark.parametrize("in_place", [False, True])
def test_equals_the_oracle(dtype: torch.dtype, temperature: float, shift: float, in_place: bool) -> None:
    """Five rows a block left over, three splits, a ragged tile; upstream of zeros and negatives."""
    g = torch.Generator().manual_seed(0)
    columns = 2 * 8 * 32 + 77
    logits = (torch.randn(3, 7, columns, generator=g) * 8 + shift).to(dtype)
    targets = torch.randint(0, columns, (3, 7), generator=g)
    targets[0, 0], targets[1, 1], targets[2, 3] = columns - 1, 0, -100
    upstream = torch.randn(3, 7, generator=g)
    upstream[0, 4] = 0

    def evaluate(x: Tensor, backend: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone().to(device).requires_grad_()
        taken = leaf * 1 if in_place else leaf
        out = selective_logprobs(
            taken, targets.to(device), temperature=temperature, backend=backend, inplace_backward=in_place
        )
        out.backward(upstream.to(device, out.dtype))
        assert leaf.grad is not None
        return out.detach().cpu(), leaf.grad.cpu()

    truth = evaluate(logits.double(), "reference")
    reference = evaluate(logits, "reference")
    for got, book, true in zip(evaluate(logits, "triton", DEVICE), reference, truth, strict=True):
        assert_as_good_as_reference(got, book, true)


def test_nothing_to_do_and_strided() -> None:
    none = torch.randn(0, 5, device=DEVICE, requires_grad=True)
    selective_logprobs(none, torch.empty(0, dtype=torch.int64, device=DEVICE), backend="triton").sum().backward()
    base = torch.randn(6, 40, 3, device=DEVICE)
    targets = torch.randint(0, 40, (6, 3), device=DEVICE)
    apart = torch.stack([targets, targets + 1000], -1)[..., 0]  # not dense: their neighbours are no targets
    for logits in (base.transpose(1, 2), torch.randn(6, 3, 90, device=DEVICE)[..., 7:47]):
        for wanted in (targets, apart):
            leaves = [logits.clone().requires_grad_() for _ in range(2)]
            backends = ("triton", "reference")
            got, expected = (
                selective_logprobs(leaf, wanted, backend=b) for leaf, b in zip(leaves, backends, strict=True)
            )
            torch.testing.assert_close(got, expected)
            gradients = (torch.autograd.grad(out.sum(), x)[0] for out, x in zip((got, expected), leaves, strict=True))
            torch.testing.assert_close(*gradients)
    ignored = torch.randn(4, 9, device=DEVICE, requires_grad=True)
    out = selective_logprobs(ignored, torch.full((4,), -100, device=DEVICE), backend="triton")
    out.sum().backward()
    assert not out.any() and ignored.grad is not None and not ignored.grad.any()


def test_a_target_outside_the_vocabulary_gives_nan() -> None:
    targets = torch.tensor([33, 2**33, 3], device=DEVICE)
    out = selective_logprobs(torch.randn(3, 33, device=DEVICE), targets, validate=False, backend="triton")
    assert out.isnan().tolist() == [True, True, False]


def test_offsets_beyond_32_bits() -> None:
    stride = 2**31 // 8 + 64
    try:
        storage = torch.empty(stride * 9, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("5 GB of memory are not to be had")
    logits = storage.as_strided((9, 40), (stride, 1))
    logits.copy_(torch.randn(9, 40))
    targets = torch.arange(9, device=DEVICE)
    got = selective_logprobs(logits, targets, backend="triton")
    torch.testing.assert_close(got, selective_logprobs(logits.clone(), targets, backend="reference"))


def test_in_place_means_the_logits_storage() -> None:
    leaf = torch.randn(4, 50, device=DEVICE, requires_grad=True)
    logits = leaf * 2
    out = selective_logprobs(logits, torch.arange(4, device=DEVICE), backend="triton", inplace_backward=True)
    (gradient,) = torch.autograd.grad(out.sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), logits)


def test_splits_depend_on_the_columns_only() -> None:
    a, b = torch.empty(1, 1000, device=DEVICE), torch.empty(70, 1000, device=DEVICE)
    assert kernels.splits_of(a) == kernels.splits_of(b) >= 1
