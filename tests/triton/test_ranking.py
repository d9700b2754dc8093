"""linear_ranking_loss on Triton kernels: within its budget, beyond it, and groups of both kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.triton.device import DEVICE
from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tests.tuna_kernels.head import test_ranking_loss as cases
from tuna_kernels import Group, linear_ranking_loss, pack_groups

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the shared cases are CPU tensors: in the interpreter")


@pytest.mark.parametrize("preset", cases.PRESETS)
@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"lora": True, "logit_scale": 0.5, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("budget", [0, cases.ONE_GROUP, None])
def test_equals_the_reference(preset: str, options: dict[str, Any], budget: int | None) -> None:
    groups = cases.make_groups()
    truth = cases.evaluate(groups, "reference", torch.float64, preset=preset, **options)
    reference = cases.evaluate(groups, "reference", torch.float32, preset=preset, **options)
    got = cases.evaluate(groups, "triton", torch.float32, preset=preset, logits_budget=budget, **options)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_as_good_as_reference(got[name], reference[name], truth[name], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0, None])
def test_half_precision(dtype: torch.dtype, budget: int | None) -> None:
    """With the mean over many groups as upstream: float16 gradients of logits would vanish unscaled."""
    tree = pack_groups(cases.make_groups())
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).to(dtype) for n in (tree.num_tokens, cases.VOCABULARY))
    results = {}
    for name, backend, kind in (
        ("truth", "reference", torch.float64),
        ("reference", "reference", dtype),
        ("got", "triton", dtype),
    ):
        h, w = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        out = linear_ranking_loss(h, w, tree, backend=backend, logits_budget=budget)
        (out.loss * 0.01).backward()
        results[name] = (out.logprobs, h.grad, w.grad)
    for got, reference, truth in zip(results["got"], results["reference"], results["truth"], strict=True):
        assert got is not None and reference is not None and truth is not None
        assert_as_good_as_reference(got, reference, truth, rounded=dtype)


@pytest.mark.parametrize("budget", [0, None])
def test_second_backward(budget: int | None) -> None:
    cases.test_a_second_backward_gives_the_bits_of_the_first("triton", budget)


@pytest.mark.parametrize("preset", cases.PRESETS)
def test_a_token_without_probability(preset: str) -> None:
    cases.test_a_token_without_probability("triton", preset, 1.0)


def test_loss_scaling_and_sharing() -> None:
    cases.test_half_precision_gradients_survive_loss_scaling("triton")
    cases.test_sharing_changes_nothing("triton", "paper", "none")


def test_degenerate() -> None:
    cases.test_one_candidate_is_supervised_fine_tuning("triton")
    cases.test_no_groups_is_a_connected_zero("triton")


def test_groups_with_separated_scores_have_no_gradient_rows() -> None:
    """Rows dropped from a kept block: the gradient reads the rows that stay."""
    groups = [Group([0], [[1], [2], [3]], ranks=[0, 1, 2]), Group([0, 4], [[5, 6], [7, 1]], ranks=[0, 1])]
    tree = pack_groups(groups)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tree.num_tokens, 8, generator=g) * 3, torch.randn(11, 8, generator=g)
    grads = []
    for backend in ("triton", "reference"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_ranking_loss(h, w, tree, mle_weight=0.0, margin=0.01, backend=backend)
        out.loss.backward()
        assert not out.active.all() and out.active.any(), "the case must have rows of both kinds"
        grads.append((h.grad, w.grad))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
