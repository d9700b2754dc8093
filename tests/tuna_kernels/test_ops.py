"""Registered ops keep torch.library's contract: opcheck, torch.compile without a graph break, torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import tuna_kernels as tk

NATIVE = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(bool(tk.available_backends()["cpu"]), reason=tk.available_backends()["cpu"]),
)
BACKENDS = ["torch", NATIVE]
OPS = torch.ops.tuna_kernels
TREE = tk.pack_groups(
    [
        tk.Group([1, 2, 3], [[4, 5], [4, 6, 7], [8]], scores=[1.0, 0.5, 0.5]),
        tk.Group([9], [[3, 2, 1], [3, 3]], ranks=[1, 0]),
    ]
)


def leaves() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TREE.num_tokens, 16, generator=g, requires_grad=True)
    return hidden, torch.randn(31, 16, generator=g, requires_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entropy,unit", [(True, False), (False, True), (False, False)])
def test_opcheck_linear_logprobs(backend: str, entropy: bool, unit: bool) -> None:
    hidden, weight = leaves()
    weight = weight.detach() if unit else weight
    arguments = (1.0, 5.0, TREE.targets, TREE.rows, -100, entropy, unit, backend)
    opcheck(OPS.linear_logprobs.default, (hidden, weight, None, None, None, *arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_the_others(backend: str) -> None:
    hidden, weight = leaves()
    logits = torch.randn(4, 9, requires_grad=True)
    opcheck(OPS.selective_logprobs.default, (logits, torch.tensor([1, -100, 3, 8]), 0.7, -100, backend))
    layout = (TREE.rows, TREE.targets, TREE.candidate_offsets, TREE.ranks, TREE.group_offsets)
    settings = ("released", 0.1, 1.0, 1.0, -1, [], 0, 1 << 20, [True, True, False, False, False])
    opcheck(OPS.linear_ranking_loss.default, (hidden, weight, None, None, None, 1.0, None, *layout, *settings, backend))
    scores = torch.randn(TREE.num_candidates, requires_grad=True)
    opcheck(OPS.ranking_loss.default, (scores, TREE.ranks, TREE.group_offsets, 0.1, "mean_per_lag", -1, []))


def step_by_step(hidden: Tensor, weight: Tensor) -> Tensor:
    logprobs = tk.linear_logprobs(hidden, weight, TREE.targets, rows=TREE.rows)
    assert isinstance(logprobs, Tensor)
    scores = tk.sequence_scores(logprobs, TREE.candidate_offsets)
    return tk.ranking_loss(scores, TREE.ranks, TREE.group_offsets) * 2


def at_once(hidden: Tensor, weight: Tensor) -> Tensor:
    return tk.linear_ranking_loss(hidden, weight, TREE, preset="released").loss * 2


def on_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return tk.selective_logprobs(hidden @ weight.t(), TREE.input_ids).sum()


@pytest.mark.parametrize("function", [step_by_step, at_once, on_logits])
def test_compiles_whole_and_equals_eager(function: Any) -> None:
    hidden, weight = leaves()
    eager = function(hidden, weight)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(compiled, eager)
    wanted = torch.autograd.grad(eager, (hidden, weight))
    for got, expected in zip(torch.autograd.grad(compiled, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_exports() -> None:
    class Scores(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
            logprobs = tk.linear_logprobs(hidden, weight, TREE.targets, rows=TREE.rows)
            assert isinstance(logprobs, Tensor)
            return tk.sequence_scores(logprobs, TREE.candidate_offsets)

    hidden, weight = (x.detach() for x in leaves())
    exported = torch.export.export(Scores(), (hidden, weight))
    torch.testing.assert_close(exported.module()(hidden, weight), Scores()(hidden, weight))
