"""Attention sinks: one more column in the softmax, forward and every gradient, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tuna_kernels.attention.test_tree_attention import CPU, TREE, groups, inputs
from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna_kernels.attention.reference import visible
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.tree import Group, PackedTree, pack_groups

NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")
SINKS = {
    "drawn": [0.3, -1.2, 2.0, 0.0],
    "none": [-math.inf] * 4,
    "almost everything": [60.0, 55.0, 61.0, 58.0],
    "mixed": [-math.inf, 0.0, 1e4, -1e4],
}


def reference(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, tree: PackedTree, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """A key more, whose score is the sink and whose value is 0, written out apart from the library."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(group, 1)) * 0.4
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(tree.subtree_end, None, tree.position_ids, window), -math.inf)
    exponents = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    lse = torch.logsumexp(exponents, -1)
    return torch.exp(scores - lse[..., None]) @ v.repeat_interleave(group, 1), lse


def evaluate(
    leaves: list[Tensor], tree: PackedTree, backend: str, window: int | None, softcap: float | None
) -> list[Tensor]:
    """out, lse and the gradients of q, k, v and sinks for a fixed upstream of both."""
    own = [x.detach().clone().requires_grad_() for x in leaves]
    if backend == "":
        out, lse = reference(own[0], own[1], own[2], own[3], tree, window, softcap)
    else:
        out, lse = tree_attention(
            own[0], own[1], own[2], tree.subtree_end, position_ids=tree.position_ids, window=window, softcap=softcap,
            scale=0.4, sinks=own[3], return_lse=True, backend=backend,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), own, upstream)]


def check(leaves: list[Tensor], tree: PackedTree, backend: str, window: int | None, softcap: float | None) -> None:
    """Half precision: what is left of out by the sink is a second rounding, which its backward goes on from."""
    truth = evaluate([x.double() for x in leaves], tree, "", window, softcap)
    book = evaluate(leaves, tree, "reference", window, softcap)
    got = evaluate(leaves, tree, backend, window, softcap)
    score = max(1.0, truth[1][truth[1].isfinite()].abs().max().item())  # whose rounding moves a drawn case
    for name, a, b, c in zip(NAMES, got, book, truth, strict=True):
        half = leaves[0].dtype in (torch.bfloat16, torch.float16) and name != "lse"
        rounded = leaves[0].dtype if half else torch.float32
        assert_as_good_as_reference(a, b, c, name, rounded=rounded, scale=0.0 if tree is TREE else score)


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "torch", CPU])
def test_equals_one_more_column(backend: str, dtype: torch.dtype, sinks: str) -> None:
    """Two trees in the batch, two query heads a key head, with and without a window and a cap."""
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("no float64 in native code")
    if dtype == torch.float16 and sinks == "almost everything":
        pytest.skip("what is left, e⁻⁶⁰, is 0 in float16")
    leaves = [*inputs(TREE, size=6, dtype=dtype, batch=2), torch.tensor(SINKS[sinks], dtype=dtype)]
    for window, softcap in ((None, None), (3, None), (None, 2.0), (2, 3.0)):
        check(leaves, TREE, backend, window, softcap)


@pytest.mark.parametrize("backend", ["torch", CPU])
@given(
    forest=groups,
    sinks=st.lists(st.floats(-30, 30) | st.just(-math.inf), min_size=4, max_size=4),
    window=st.none() | st.integers(1, 6),
    softcap=st.none() | st.floats(0.5, 20),
    peaked=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_tree(
    backend: str, forest: list[Group], sinks: list[float], window: int | None, softcap: float | None, peaked: bool
) -> None:
    tree = pack_groups(forest)
    q, k, v = (x.detach() for x in inputs(tree, dtype=torch.float32))
    check([q * (8 if peaked else 1), k, v, torch.tensor(sinks)], tree, backend, window, softcap)


@pytest.mark.parametrize("backend", ["reference", "torch", CPU])
def test_half_precision_sinks_of_float32_attention_and_the_reverse(backend: str) -> None:
    """The parameter has a dtype of its own, which is its gradient's."""
    for dtype, of_sinks in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        leaves = [*inputs(TREE, dtype=dtype), torch.tensor(SINKS["drawn"], dtype=of_sinks)]
        *_, found = evaluate(leaves, TREE, backend, None, None)
        assert found.dtype == of_sinks
        *_, expected = evaluate([x.double() for x in leaves], TREE, "", None, None)
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_chosen_queries_and_no_rows(backend: str) -> None:
    q, k, v = (x.detach().float() for x in inputs(TREE))
    sinks = torch.tensor(SINKS["drawn"], requires_grad=True)
    rows = torch.tensor([9, 2, 2, 0])
    whole = tree_attention(q, k, v, TREE.subtree_end, sinks=sinks, backend=backend)
    some = tree_attention(q[:, :, rows], k, v, TREE.subtree_end, query_rows=rows, sinks=sinks, backend=backend)
    torch.testing.assert_close(some, whole[:, :, rows])
    none = tree_attention(q[:, :, :0], k, v, TREE.subtree_end, query_rows=rows[:0], sinks=sinks, backend=backend)
    none.sum().backward()
    assert sinks.grad is not None and not sinks.grad.any()


def test_flex_has_them_in_its_forward() -> None:
    leaves = [*(x.detach() for x in inputs(TREE, size=16, dtype=torch.float32)), torch.tensor(SINKS["drawn"])]
    with torch.no_grad():
        q, k, v, sinks = leaves
        found = tree_attention(q, k, v, TREE.subtree_end, scale=0.4, sinks=sinks, return_lse=True, backend="flex")
    for got, expected in zip(found, evaluate(leaves, TREE, "reference", None, None), strict=False):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_registered_whole(backend: str) -> None:
    q, k, v = inputs(TREE, dtype=torch.float32)
    sinks = torch.tensor(SINKS["drawn"], requires_grad=True)
    arguments = (q, k, v, TREE.subtree_end, None, None, None, 0.5, None, backend, sinks)
    torch.library.opcheck(torch.ops.tuna_kernels.tree_attention.default, arguments)

    def loss(q: Tensor, sinks: Tensor) -> Tensor:
        out, lse = tree_attention(q, k, v, TREE.subtree_end, sinks=sinks, return_lse=True, backend=backend)
        return out.square().sum() + lse.sum()

    wanted = torch.autograd.grad(loss(q, sinks), (q, sinks))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(q, sinks)
    for got, expected in zip(torch.autograd.grad(compiled, (q, sinks)), wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_bad_sinks_are_named() -> None:
    q, k, v = inputs(TREE)
    for sinks, error, message in (
        (torch.zeros(2), ValueError, r"sinks has shape \[2\], not \[4\]"),
        (torch.zeros(4, dtype=torch.int64), TypeError, "sinks is torch.int64"),
        (torch.zeros(4, device="meta"), ValueError, "sinks is on meta"),
        (torch.tensor([0.0, 0.0, math.inf, 0.0]), ValueError, r"sinks\[2\] = inf"),
    ):
        with pytest.raises(error, match=message):
            tree_attention(q, k, v, TREE.subtree_end, sinks=sinks)
