"""Whatever its strides, a tensor means its values: every op gives for them what it gives for a contiguous copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.tuna_kernels.attention.test_tree_attention import CPU
from tuna_kernels import (
    Group,
    linear_logprobs,
    linear_ranking_loss,
    pack_groups,
    ranking_loss,
    selective_logprobs,
    sequence_scores,
)
from tuna_kernels.attention.tree_attention import tree_attention

TREE = pack_groups(
    [Group([1, 2, 3], [[4, 5], [4, 6, 7], [8]], ranks=[1, 0, 2]), Group([9], [[3, 2], [3]], ranks=[0, 1])]
)
T = TREE.num_tokens


def _last_axis_apart(x: Tensor) -> Tensor:
    spread = torch.zeros(*x.shape, 2, dtype=x.dtype)
    spread[..., 1] = x
    return spread[..., 1]


def _columns_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _part_of_more(x: Tensor) -> Tensor:
    around = torch.full([size + 3 for size in x.shape], 7, dtype=x.dtype)
    part = around[tuple(slice(1, 1 + size) for size in x.shape)]
    return part.copy_(x)


def _heads_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 2 else x.clone()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__.strip("_"): f for f in (_last_axis_apart, _columns_first, _part_of_more, _heads_last)
}


def run(op: str, leaves: list[Tensor], lay: Callable[[Tensor], Tensor], backend: str) -> list[Tensor]:
    """Results and gradients with every tensor, integers and upstream too, laid out by ``lay``."""
    own = [lay(x).detach().requires_grad_() for x in leaves]
    end, depth, rows, targets, ranks = map(
        lay, (TREE.subtree_end, TREE.position_ids, TREE.rows, TREE.targets, TREE.ranks)
    )
    outs: tuple[Tensor, ...]
    if op == "attention":
        queries = lay(torch.tensor([5, 0, 3, T - 1]))
        outs = tree_attention(
            own[0][:, :, :4], own[1], own[2], end, query_rows=queries, position_ids=depth, window=3, sinks=own[3],
            return_lse=True, backend=backend,
        )  # fmt: skip
    elif op == "attention without lse":
        outs = (tree_attention(own[0], own[1], own[2], end, backend=backend),)
    elif op == "logprobs":
        outs = tuple(
            linear_logprobs(
                own[0], own[1], targets, rows=rows, bias=own[2], return_lse=True, return_entropy=True, backend=backend
            )
        )
    elif op == "selective":
        outs = (selective_logprobs(own[0], lay(torch.arange(T * 2).view(2, T) % 5), backend=backend),)
    elif op == "ranking":
        outs = (linear_ranking_loss(own[0], own[1], TREE, bias=own[2], backend=backend).loss,)
    else:
        scores = sequence_scores(own[0], lay(TREE.candidate_offsets))
        outs = (ranking_loss(lay(scores), ranks, lay(TREE.group_offsets)),)
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(x.shape, generator=generator) for x in outs]
    plain = torch.autograd.grad(outs, own, upstream, retain_graph=True, allow_unused=True)
    used = [x for x, gradient in zip(own, plain, strict=True) if gradient is not None]
    laid = [lay(u) if u.ndim else u for u in upstream]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, used, laid)]


def leaves_of(op: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    if op.startswith("attention"):
        return [*(torch.randn(2, h, T, 6, generator=g) for h in (4, 2, 2)), torch.randn(4, generator=g)]
    if op in ("logprobs", "ranking"):
        return [torch.randn(T, 6, generator=g), torch.randn(11, 6, generator=g), torch.randn(11, generator=g)]
    return [torch.randn(2, T, 5, generator=g)] if op == "selective" else [torch.randn(TREE.num_slots, generator=g)]


OPS = ["attention", "attention without lse", "logprobs", "selective", "ranking", "scores"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "torch", CPU])
@pytest.mark.parametrize("op", OPS)
def test_strides(op: str, backend: str, layout: str) -> None:
    leaves = leaves_of(op)
    expected = run(op, leaves, torch.clone, backend)
    for found, wanted in zip(run(op, leaves, LAYOUTS[layout], backend), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", CPU])
@pytest.mark.parametrize("op", OPS)
def test_expanded(op: str, backend: str) -> None:
    """One head, row, batch or entry repeated without memory of its own, along any axis; the upstream too."""
    for axis in range(leaves_of(op)[0].ndim):

        def repeated(x: Tensor, axis: int = axis) -> Tensor:
            return x.narrow(axis, 0, 1).expand(x.shape) if axis < x.ndim and x.is_floating_point() else x

        leaves = [repeated(x) for x in leaves_of(op)]
        expected = run(op, leaves, lambda x: repeated(x).clone(memory_format=torch.contiguous_format), backend)
        for found, wanted in zip(run(op, leaves, repeated, backend), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_expanded_logits_are_not_overwritten_in_place(backend: str) -> None:
    """Rows that share memory would overwrite each other's gradient."""
    row, targets = torch.randn(1, 9, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 5, -100, 8])
    found = []
    for in_place in (False, True):
        leaf = row.clone().requires_grad_()
        logits = (leaf * 1).expand(4, 9)
        out = selective_logprobs(logits, targets, inplace_backward=in_place, backend=backend)
        found.append(torch.autograd.grad(out, leaf, torch.tensor([1.0, -2.0, 3.0, 0.5]))[0])
    torch.testing.assert_close(found[1], found[0])
