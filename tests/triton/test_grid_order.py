"""Programs of a grid may run in any order: every kernel leaves the same bits when its grid is walked backwards.

Memory that is not written yet holds NaN here, so that a program that counts on another one shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.triton.device import DEVICE
from tests.triton.grid import ORDERS, kernel_name, programs_run
from tuna_kernels import Group, linear_logprobs, linear_ranking_loss, pack_groups, selective_logprobs, tree_attention
from tuna_kernels.attention.triton import launches
from tuna_kernels.gpu.static_case import Config, kernel_modules
from tuna_kernels.head.triton import slabs

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the order of programs is the interpreter's to choose")
PATCH = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with `fill_uninitialized_memory`, on by default
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    upstream = [_draw(*x.shape).to(x.dtype) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def _head(patch: PATCH) -> list[Tensor]:
    """Several slots a row, slabs, splits, column sums (bias) and column peaks (filter)."""
    patch.setattr(slabs, "SLAB_BYTES", 1)
    patch.setattr(slabs, "MIN_COLUMNS", 150)
    hidden, weight, bias, lora_b = (_draw(*shape).requires_grad_() for shape in ((37, 40), (397, 40), (397,), (397, 3)))
    targets, rows = torch.arange(60) * 13 % 397, torch.arange(60) * 7 % 37
    outputs = linear_logprobs(
        hidden, weight, targets, rows=rows, bias=bias, lora=(_draw(3, 40), lora_b, 0.5), softcap=20.0,
        return_lse=True, return_entropy=True, filter_eps=1e-6, backend="triton",
    )  # fmt: skip
    assert isinstance(outputs, tuple)
    return _gradients(outputs, [hidden, weight, bias, lora_b])


def _frozen_head(patch: PATCH) -> list[Tensor]:
    """The unit gradient: slabs of logits by torch, softmax and exponentials in kernels, then rows of the head."""
    patch.setattr("tuna_kernels.head.logprobs.unit_gradient_pays", lambda *_: True)
    patch.setattr(slabs, "SLAB_BYTES", 1)
    patch.setattr(slabs, "MIN_COLUMNS", 150)
    hidden = _draw(37, 40).requires_grad_()
    targets, rows = torch.arange(60) * 13 % 397, torch.arange(60) * 7 % 37
    out = linear_logprobs(hidden, _draw(397, 40), targets, rows=rows, backend="triton")
    assert isinstance(out, Tensor)
    return _gradients((out,), [hidden])


def _ranking(patch: PATCH) -> list[Tensor]:
    """A kept block of logits, of which the gradient reads some rows."""
    tree = pack_groups([Group([1] * 5, [[2, 3, i, *[i] * 9] for i in range(4)], ranks=[0, 1, 2, 3])] * 2)
    hidden, weight = _draw(tree.num_tokens, 40).requires_grad_(), _draw(397, 40).requires_grad_()
    out = linear_ranking_loss(hidden, weight, tree, mle_weight=0.0, margin=0.01, backend="triton")
    assert not out.active.all() and out.active.any(), "the case must have rows of both kinds"
    return [out.logprobs, out.scores, *_gradients((out.loss,), [hidden, weight])]


def _selective(patch: PATCH) -> list[Tensor]:
    """The gradient overwrites the logits."""
    leaf = _draw(37, 700).requires_grad_()
    out = selective_logprobs(leaf * 1, torch.arange(37), backend="triton", inplace_backward=True)
    return _gradients((out,), [leaf])


def _attention(patch: PATCH) -> list[Tensor]:
    """Splits, a window, chosen queries in an order of their own, an upstream of the log-sum-exp."""
    small = Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=2)
    patch.setattr(launches, "candidates", lambda *_, **__: (small,))
    patch.setattr(launches, "_splits", lambda *_: 3)
    tree = pack_groups([Group([1] * 21, [[i, *[7] * 12] for i in range(3)]), Group([5, 6], [[1], [2] * 9])])
    rows = torch.arange(tree.num_tokens).flip(0)[:-3]
    q = _draw(1, 4, len(rows), 16).requires_grad_()
    k, v = (_draw(1, 2, tree.num_tokens, size).requires_grad_() for size in (16, 40))
    outputs = tree_attention(
        q, k, v, tree.subtree_end, query_rows=rows, position_ids=tree.position_ids, window=20, softcap=5.0,
        return_lse=True, backend="triton",
    )  # fmt: skip
    assert isinstance(outputs, tuple)
    return _gradients(outputs, [q, k, v])


@dataclass(frozen=True)
class Case:
    """What to run, and the kernels that it launches with more than one program."""

    run: Callable[[PATCH], list[Tensor]]
    kernels: frozenset[str]


def _of_head(*names: str) -> frozenset[str]:
    return frozenset(f"head.{name}_kernel" for name in names)


CASES = {
    "head": Case(_head, _of_head("forward.forward", "forward.finish", "gradient.gradient")),
    "frozen head": Case(
        _frozen_head,
        _of_head("logits.logits_forward", "logits.logits_gradient", "unit.unit"),
    ),
    "ranking": Case(_ranking, _of_head("logits.logits_forward", "logits.logits_gradient")),
    "selective": Case(_selective, _of_head("logits.logits_forward", "logits.logits_gradient")),
    "attention": Case(
        _attention,
        frozenset({f"attention.{name}_kernel" for name in ("forward.forward", "backward.dq", "backward.dkv")}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_programs_does_not_show(name: str) -> None:
    case, found = CASES[name], []
    for order in ORDERS:
        with PATCH.context() as patch, programs_run(order) as launched:
            found.append(case.run(patch))
        assert {kernel for kernel, programs in launched.items() if programs > 1} >= case.kernels
    for upwards, downwards in zip(*found, strict=True):
        assert upwards.isfinite().all() and torch.equal(upwards, downwards)


def test_no_kernel_is_left_out() -> None:
    there = {
        kernel_name(name, found)
        for name, module in kernel_modules().items()
        for found, value in vars(module).items()
        if found.endswith("_kernel") and getattr(value, "fn", None) and value.fn.__module__ == module.__name__
    }
    assert len(there) >= 9 and there == frozenset().union(*(case.kernels for case in CASES.values()))
