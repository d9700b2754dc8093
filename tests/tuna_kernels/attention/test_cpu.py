"""Native tree attention: as near to float64 as plain PyTorch on every instruction set, over blocks, chunks and
heads; the same bits whatever the threads; NaN stays in its group; half precision is rounded once; working memory as
stated."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tuna_kernels.attention.test_tree_attention import TREE, gradients, inputs
from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna.compare.memory_meter import allocator_peak
from tuna_kernels import available_backends
from tuna_kernels.attention import cpu as attention_cpu
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.native import native
from tuna_kernels.tree import Group, PackedTree, pack_groups

pytestmark = pytest.mark.skipif(bool(available_backends()["cpu"]), reason=available_backends()["cpu"])
SETS = ("generic", "avx2", "avx512")


def long_group(prompt: int, *responses: int) -> Group:
    """Responses that share nothing but the prompt."""
    return Group(prompt=[0] * prompt, responses=[[i + 1, *[0] * (n - 1)] for i, n in enumerate(responses)])


# Prompts, branches and single rows around the edges of blocks (32 queries, 64 keys) and vectors (16), nested sharing,
# runs of tiny branches, and a group long enough for several chunks.
FOREST = [
    long_group(80, 150, 64, 65, 1),
    long_group(1, 16, 17, 15),
    Group(prompt=[0] * 33, responses=[[1] * 40 + [2] * 30, [1] * 40 + [3] * 5, [1] * 20, [4]]),
    long_group(5, *[2] * 40),
    long_group(130, 300, 270),
]
BLOCKS = pack_groups(FOREST)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every set that this processor has, one after the other."""
    chosen = getattr(native().InstructionSet, request.param)
    if int(chosen) > int(native().best_instruction_set()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(attention_cpu, "instruction_set", lambda: chosen)
    yield request.param


def leaves_of(tree: PackedTree, heads: tuple[int, int], size: int, value_size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads[0], size), (heads[1], size), (heads[1], value_size))
    return [torch.randn(1, h, tree.num_tokens, n, generator=generator).requires_grad_() for h, n in shapes]


def results(leaves: list[Tensor], tree: PackedTree, backend: str, **arguments: Any) -> list[Tensor]:
    """out, lse, dq, dk, dv under a random upstream of both outputs."""
    outputs = tree_attention(
        *leaves, tree.subtree_end, position_ids=tree.position_ids, return_lse=True, backend=backend, **arguments
    )
    return [*outputs, *gradients(outputs, leaves)]


def expectations(leaves: list[Tensor], tree: PackedTree, **arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Of plain PyTorch: in float32, and in float64."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    return results(leaves, tree, "reference", **arguments), results(exact, tree, "reference", **arguments)


def assert_as_good(found: list[Tensor], expected: tuple[list[Tensor], list[Tensor]]) -> None:
    for name, got, reference, truth in zip(("out", "lse", "dq", "dk", "dv"), found, *expected, strict=True):
        assert_as_good_as_reference(got, reference, truth, name)


def assert_near_float64(leaves: list[Tensor], tree: PackedTree, **arguments: Any) -> None:
    assert_as_good(results(leaves, tree, "cpu", **arguments), expectations(leaves, tree, **arguments))


CASES: dict[str, tuple[tuple[int, int], int, int, dict[str, Any]]] = {
    "grouped queries": ((6, 2), 64, 64, {}),
    "many queries a key head": ((9, 1), 16, 16, {}),
    "one head, one number": ((1, 1), 1, 1, {}),
    "odd sizes": ((3, 3), 80, 17, {"scale": 0.3}),
    "large heads": ((2, 1), 128, 96, {"softcap": 1.5}),
    "window": ((4, 2), 33, 48, {"window": 70}),
    "narrow window": ((2, 2), 16, 16, {"window": 3, "softcap": 20.0}),
}


@cache
def case_expectations(case: str) -> tuple[list[Tensor], list[Tensor]]:
    heads, size, value_size, arguments = CASES[case]
    return expectations(leaves_of(BLOCKS, heads, size, value_size), BLOCKS, **arguments)


@pytest.mark.parametrize("case", CASES)
def test_as_good_as_reference(case: str, instruction_set: str) -> None:
    heads, size, value_size, arguments = CASES[case]
    leaves = leaves_of(BLOCKS, heads, size, value_size)
    assert_as_good(results(leaves, BLOCKS, "cpu", **arguments), case_expectations(case))


lengths = st.integers(1, 100)


@given(
    forest=st.lists(
        st.builds(
            lambda prompt, responses: long_group(prompt, *responses), lengths, st.lists(lengths, min_size=1, max_size=4)
        ),
        min_size=1,
        max_size=2,
    ),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 1)]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    window=st.none() | st.integers(1, 120),
    softcap=st.none() | st.floats(0.5, 20),
    rows=st.none() | st.lists(st.floats(0, 1, exclude_max=True), max_size=150),
)
@settings(max_examples=40, deadline=None)
def test_any_tree_and_choice_of_queries(
    forest: list[Group],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    window: int | None,
    softcap: float | None,
    rows: list[float] | None,
) -> None:
    tree = pack_groups(forest)
    leaves = leaves_of(tree, heads, *sizes)
    arguments: dict[str, Any] = {"window": window, "softcap": softcap}
    if rows is not None:
        chosen = torch.tensor([int(x * tree.num_tokens) for x in rows], dtype=torch.int64)
        leaves[0] = leaves[0].detach()[:, :, chosen].requires_grad_()
        arguments["query_rows"] = chosen
    assert_near_float64(leaves, tree, **arguments)


def test_peaked_and_far_scores() -> None:
    """Nearly one-hot weights, and scores that all lie far below or above 0."""
    for factor, shift in ((30.0, 0.0), (0.1, 40.0), (0.1, -40.0)):
        q, k, v = (x.detach() for x in leaves_of(BLOCKS, (2, 1), 24, 24))
        q, k = q * factor, k + shift * q.mean(1, keepdim=True).sign() if shift else k
        assert_near_float64([x.requires_grad_() for x in (q, k, v)], BLOCKS)


def test_the_number_of_threads_changes_no_bit() -> None:
    leaves = leaves_of(BLOCKS, (4, 2), 32, 32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(leaves, BLOCKS, "cpu", window=200, softcap=5.0))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("packed", range(len(FOREST)))
def test_a_group_of_several_chunks_gets_the_same_bits_alone(packed: int) -> None:
    leaves = leaves_of(BLOCKS, (4, 1), 16, 16)
    together = results(leaves, BLOCKS, "cpu")[:2]
    together += torch.autograd.grad(tree_attention(*leaves, BLOCKS.subtree_end, backend="cpu").square().sum(), leaves)
    part = slice(*BLOCKS.group_rows_host[packed : packed + 2].tolist())
    own, tree = [x.detach()[:, :, part].requires_grad_() for x in leaves], pack_groups([FOREST[packed]])
    alone = list(tree_attention(*own, tree.subtree_end, return_lse=True, backend="cpu"))
    alone += torch.autograd.grad(alone[0].square().sum(), own)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[:, :, part])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_stays_in_its_group(which: int) -> None:
    """Of q, k or v: no other group's output, log-sum-exp or gradient moves by a bit."""
    leaves = leaves_of(BLOCKS, (4, 2), 20, 20)
    clean = results(leaves, BLOCKS, "cpu")
    first, last = BLOCKS.group_rows_host[2:4].tolist()
    with torch.no_grad():
        leaves[which][:, :, (first + last) // 2] = torch.nan
    for dirty, expected in zip(results(leaves, BLOCKS, "cpu"), clean, strict=True):
        outside = torch.ones(dirty.shape[2], dtype=torch.bool)
        outside[first:last] = False
        assert torch.equal(dirty[:, :, outside], expected[:, :, outside])
        assert which == 2 or dirty.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    """The very bits of float32 attention over the converted inputs, rounded."""
    halves = [x.detach().to(dtype).requires_grad_() for x in leaves_of(BLOCKS, (4, 2), 24, 40)]
    floats = [x.detach().float().requires_grad_() for x in halves]
    out, lse = tree_attention(*halves, BLOCKS.subtree_end, return_lse=True, backend="cpu")
    exact, exact_lse = tree_attention(*floats, BLOCKS.subtree_end, return_lse=True, backend="cpu")
    assert torch.equal(out, exact.to(dtype)) and torch.equal(lse, exact_lse)
    for a, b in zip(gradients((lse,), halves), gradients((exact_lse,), floats), strict=True):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Means of neighbouring numbers of all 65,536: every tie, subnormal, infinity and NaN."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    v = torch.stack([patterns, patterns.roll(1)]).view(1, 1, 2, -1)
    q = torch.zeros(1, 1, 2, 1, dtype=dtype)
    out = tree_attention(q, q, v, torch.tensor([2, 2]), backend="cpu")[0, 0, 1]
    expected = (0.5 * (v[0, 0, 0].float() + v[0, 0, 1].float())).to(dtype)
    # A sum of two largest numbers is one of infinities: here it is halved in float32, as there.
    assert torch.equal(out.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.mark.parametrize("backward", [False, True])
def test_working_memory_is_as_stated_and_far_from_a_square(backward: bool) -> None:
    leaves = leaves_of(BLOCKS, (4, 2), 64, 64)
    stated = attention_cpu.workspace_bytes(BLOCKS.subtree_end, heads=4, key_heads=2, size=64, backward=backward)

    def call() -> list[Tensor]:
        out, lse = tree_attention(*leaves, BLOCKS.subtree_end, return_lse=True, backend="cpu")
        return list(torch.autograd.grad(out, leaves, out.detach())) if backward else [out, lse]

    kept = sum(x.numel() * x.element_size() for x in call())
    if backward:  # the forward's results are there as well
        kept += leaves[0].numel() * 4 + leaves[0].numel() // 64 * 4
    peak = allocator_peak(call)
    assert abs(peak - kept - stated) <= 0.02 * peak
    long = pack_groups([FOREST[0]] * 40)
    more = attention_cpu.workspace_bytes(long.subtree_end, heads=4, key_heads=2, size=64, backward=backward)
    assert more < 4 * long.num_tokens * 2 * 64 * 16


def test_opcheck() -> None:
    leaves = leaves_of(TREE, (4, 2), 3, 2)
    arguments = (*leaves, TREE.subtree_end, None, TREE.position_ids, 3, 0.5, 2.0, "cpu")
    ops = torch.ops.tuna_kernels
    torch.library.opcheck(ops.tree_attention.default, arguments)
    out, lse = (x.detach() for x in ops.tree_attention(*arguments))
    detached = [x.detach() for x in leaves]
    torch.library.opcheck(
        ops.tree_attention_backward.default,
        (*detached, *arguments[3:-1], out, lse, torch.ones_like(out), torch.ones_like(lse), "cpu"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_without_graph_breaks() -> None:
    def loss(*qkv: Tensor) -> Tensor:
        return tree_attention(*qkv, TREE.subtree_end, backend="cpu").square().sum()

    leaves = inputs(TREE, dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_layouts_of_models() -> None:
    """Transposed heads, expanded keys, an upstream expanded from one number, rows that are not dense."""
    q, k, v = (x.detach() for x in leaves_of(BLOCKS, (4, 1), 12, 12))
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(tree_attention(*plain, BLOCKS.subtree_end, backend="cpu").sum(), plain)
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k = k.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    v.requires_grad_()
    out = tree_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1), BLOCKS.subtree_end, backend="cpu")
    assert out.transpose(1, 2).is_contiguous()
    for a, b in zip(torch.autograd.grad(out.sum(), [q, k, v]), expected, strict=True):
        torch.testing.assert_close(a, b)
