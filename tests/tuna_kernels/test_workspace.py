"""What an op takes beyond its results, held to PyTorch's allocator: never more than stated, nor far below it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tuna_kernels as tk
from tuna.compare.memory_meter import allocator_peak

NATIVE = not tk.available_backends()["cpu"]
BACKENDS = ["reference", "torch", *(["cpu"] if NATIVE else [])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SLACK = 1 << 18
"""Bytes of small tensors: offsets, counts, the scalars of a loss."""


def _taken(call: Callable[[], object], results: int) -> int:
    call()  # caches (plans, thread pools) are not the op's
    return allocator_peak(call) - results


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def _check(taken: int, stated: int, backend: str) -> None:
    assert taken <= stated + SLACK
    # a bound that says nothing would pass the line above
    assert stated <= (8 if backend == "reference" else 4) * taken + (40 << 20)


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _fits(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the native backend has no float64")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head(backend: str, dtype: torch.dtype, frozen: bool) -> None:
    _fits(backend, dtype)
    rows, width, vocabulary = 1100, 64, 4500
    hidden, weight = _leaf(rows, width, dtype=dtype), _leaf(vocabulary, width, dtype=dtype)
    weight.requires_grad_(not frozen)
    targets = torch.randint(vocabulary, (rows,))
    stated = tk.workspace_bytes(
        "linear_logprobs", {"rows": rows, "width": width, "vocabulary": vocabulary}, dtype, backend
    )
    wanted = [hidden] if frozen else [hidden, weight]

    def call() -> object:
        logprobs = tk.linear_logprobs(hidden, weight, targets, backend=backend)
        assert isinstance(logprobs, Tensor)
        return torch.autograd.grad(logprobs.sum(), wanted)

    _check(_taken(call, _size(*wanted)), stated, backend)


@pytest.mark.parametrize("budget", [0, 4 << 20, 64 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranking_loss(backend: str, dtype: torch.dtype, budget: int) -> None:
    """In half precision the ready gradients, float32, are results too until the backward takes them."""
    _fits(backend, dtype)
    width, vocabulary = 64, 4500
    groups = [tk.Group([1] * 20, [[c, *range(80)] for c in range(4)], ranks=[0, 1, 2, 3])] * 4
    tree = tk.pack_groups(groups)
    hidden, weight = _leaf(tree.num_tokens, width, dtype=dtype), _leaf(vocabulary, width, dtype=dtype)
    shape = {"rows": tree.num_slots, "width": width, "vocabulary": vocabulary, "logits_budget": budget}
    stated = tk.workspace_bytes("linear_ranking_loss", shape, dtype, backend)

    def call() -> object:
        return tk.linear_ranking_loss(hidden, weight, tree, logits_budget=budget, backend=backend).loss

    ready = _size(hidden, weight) * (2 if dtype == torch.bfloat16 else 1)
    _check(_taken(call, 0 if backend == "reference" else ready), stated, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_selective(backend: str, dtype: torch.dtype) -> None:
    _fits(backend, dtype)
    logits = _leaf(1200, 4500, dtype=dtype)
    targets = torch.randint(4500, (1200,))
    stated = tk.workspace_bytes("selective_logprobs", {"rows": 1200, "vocabulary": 4500}, dtype, backend)

    def call() -> object:
        return torch.autograd.grad(tk.selective_logprobs(logits, targets, backend=backend).sum(), logits)

    _check(_taken(call, _size(logits)), stated, backend)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_attention(backend: str, dtype: torch.dtype, softcap: float | None) -> None:
    heads, kv_heads, size = 4, 2, 32
    groups = [tk.Group([1] * 130, [[c, *range(70)] for c in range(3)], ranks=[0, 1, 2])] * 2
    tree = tk.pack_groups(groups)
    rows = tree.num_tokens
    q, k, v = (_leaf(1, h, rows, size, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    shape = {"rows": rows, "heads": heads, "kv_heads": kv_heads, "head_size": size, "longest": 201}
    stated = tk.workspace_bytes("tree_attention", shape, dtype, backend)
    upstream = torch.randn_like(q)

    def forward() -> object:
        with torch.no_grad():
            return tk.tree_attention(q, k, v, tree.subtree_end, softcap=softcap, backend=backend)

    def both() -> object:
        out = tk.tree_attention(q, k, v, tree.subtree_end, softcap=softcap, backend=backend)
        return torch.autograd.grad(out, (q, k, v), upstream)

    lse = heads * rows * (8 if dtype == torch.float64 else 4)
    taken = max(_taken(forward, _size(q) + lse), _taken(both, 2 * _size(q) + _size(k, v) + lse))
    _check(taken, stated, backend)


def test_missing_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape lacks \['logits_budget'\]"):
        tk.workspace_bytes("linear_ranking_loss", {"rows": 1, "width": 1, "vocabulary": 1}, torch.float32)
    with pytest.raises(ValueError, match="op = 'softmax' is not one of"):
        tk.workspace_bytes("softmax", {}, torch.float32)
    shape = {"rows": 1, "heads": 1, "kv_heads": 1, "head_size": 1, "longest": 1}
    with pytest.raises(ValueError, match="backend = 'fast' is not one of"):
        tk.workspace_bytes("tree_attention", shape, torch.float32, "fast")
