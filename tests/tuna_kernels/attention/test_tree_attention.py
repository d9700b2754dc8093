"""Tree attention: equal to the reference, differentiable, block by block, the same bits alone and in
company."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuna_kernels import available_backends
from tuna_kernels.attention import block_plan, blocks
from tuna_kernels.attention import torch as attention_torch
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.tree import Group, PackedTree, Share, pack_groups

TREE = pack_groups(
    [
        Group(prompt=[1, 2, 3], responses=[[4, 5, 6, 7], [4, 5, 8], [4, 5], [9]]),
        Group(prompt=[1], responses=[[2, 3, 4, 5, 6]]),
        Group(prompt=[5, 6], responses=[[1, 2], [3, 4, 5, 6, 7, 8], [3, 4, 1]]),
    ]
)

NO_NATIVE_CODE = available_backends()["cpu"]
CPU = pytest.param("cpu", marks=pytest.mark.skipif(bool(NO_NATIVE_CODE), reason=NO_NATIVE_CODE))


@contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks of at most four rows, merged only where that is nearly free: every path of the cut is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_plan, "MAX_ROWS", 4)
        patch.setattr(block_plan, "BLOCK_COST", 3)
        block_plan._build.cache_clear()
        yield
    block_plan._build.cache_clear()


tokens = st.integers(0, 2)
groups = st.lists(
    st.builds(
        Group,
        prompt=st.lists(tokens, min_size=1, max_size=6),
        responses=st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


def inputs(
    tree: PackedTree,
    heads: tuple[int, int] = (4, 2),
    size: int = 3,
    dtype: torch.dtype = torch.float64,
    batch: int = 1,
) -> list[Tensor]:
    """Random q, k and v [batch, heads, T, size] that require gradients."""
    generator = torch.Generator().manual_seed(tree.num_tokens)
    return [
        torch.randn(batch, h, tree.num_tokens, size, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    ]


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients for a fixed random upstream of every output."""
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    return list(torch.autograd.grad(outputs, leaves, upstream))


def assert_near(found: Tensor, expected: Tensor, factor: float = 64) -> None:
    """Up to `factor` rounding errors of the found dtype, relative to the largest value."""
    bound = factor * torch.finfo(found.dtype).eps * max(1.0, expected.abs().max().item() if expected.numel() else 1)
    error = (found.double() - expected.double()).abs().max().item() if found.numel() else 0.0
    assert error <= bound, f"{error} > {bound}"


def paths(tree: PackedTree) -> list[list[int]]:
    """Rows of every root-to-leaf path, by parent pointers: a derivation that does not use the rule."""
    end, depth = tree.subtree_end.tolist(), tree.position_ids.tolist()
    path: list[int] = []
    found = []
    for row, level in enumerate(depth):
        path = [*path[:level], row]
        if end[row] == row + 1:
            found.append(path)
    return found


@given(groups, st.sampled_from(["tree", "prompt", "none"]), st.none() | st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_reference_equals_plain_causal_attention_of_every_sequence(
    forest: list[Group], share: Share, window: int | None
) -> None:
    tree = pack_groups(forest, share=share)
    q, k, v = inputs(tree)
    out = tree_attention(q, k, v, tree.subtree_end, position_ids=tree.position_ids, window=window, backend="reference")
    for path in paths(tree):
        distance = torch.arange(len(path))[:, None] - torch.arange(len(path))
        seen = (distance >= 0) & (distance < (window or len(path)))
        parts = (x[:, :, path] for x in (q, k, v))
        assert_near(out[:, :, path], F.scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True))


@pytest.mark.parametrize("backend", ["torch", CPU])
@given(
    forest=groups,
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    window=st.none() | st.integers(1, 6),
    softcap=st.none() | st.floats(0.5, 20),
    scale=st.none() | st.floats(0.1, 2),
    batch=st.integers(1, 2),
    rows=st.none() | st.lists(st.floats(0, 1, exclude_max=True), min_size=0, max_size=9),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(max_examples=100, deadline=None)
def test_backends_equal_reference(
    backend: str,
    forest: list[Group],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    scale: float | None,
    batch: int,
    rows: list[float] | None,
    dtype: torch.dtype,
) -> None:
    """Output, log-sum-exp and all gradients, for trees, windows, caps and any choice and order of queries."""
    tree = pack_groups(forest)
    q, k, v = inputs(tree, heads, batch=batch, dtype=torch.float32 if backend == "cpu" else dtype)
    chosen = None
    if rows is not None:
        chosen = torch.tensor([int(x * tree.num_tokens) for x in rows], dtype=torch.int64)
        q = q.detach()[:, :, chosen].requires_grad_()

    def results(backend: str) -> tuple[Tensor, ...]:
        outputs = tree_attention(
            q,
            k,
            v,
            tree.subtree_end,
            query_rows=chosen,
            position_ids=tree.position_ids,
            window=window,
            softcap=softcap,
            scale=scale,
            return_lse=True,
            backend=backend,
        )
        return (*outputs, *gradients(outputs, [q, k, v]))

    with small_blocks():
        found = results(backend)
    for a, b in zip(found, results("reference"), strict=True):
        assert a.shape == b.shape
        assert_near(a, b)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.float32), pytest.param("cpu", torch.float32, marks=CPU.marks)],
)
def test_values_may_have_another_head_size(backend: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(TREE, size=4, dtype=dtype)
    _, _, v = inputs(TREE, size=7, dtype=dtype)
    found, expected = (tree_attention(q, k, v, TREE.subtree_end, backend=b) for b in (backend, "reference"))
    assert found.shape == (1, 4, TREE.num_tokens, 7)
    assert_near(found, expected)
    for a, b in zip(gradients((found,), [q, k, v]), gradients((expected,), [q, k, v]), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("size", [3, 16, 64])
def test_both_routes_agree(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formula and CPU flash kernel give the same float32 numbers, on blocks with and without hidden keys."""
    leaves = inputs(TREE, (6, 2), size, torch.float32)

    def results() -> tuple[Tensor, ...]:
        out, lse = tree_attention(*leaves, TREE.subtree_end, return_lse=True, backend="torch")
        return (out, lse, *gradients((out,), leaves))

    assert blocks.choose(leaves[0], leaves[2], None) is blocks.FLASH
    found = results()
    monkeypatch.setattr(attention_torch, "choose", lambda *_: blocks.MATH)
    for a, b in zip(found, results(), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 1.5), (2, 0.7)])
def test_gradcheck(backend: str, window: int | None, softcap: float | None) -> None:
    """The closed-form backward is the derivative of the forward, through out and lse."""
    tree = pack_groups([Group(prompt=[1, 2], responses=[[3, 4], [3, 5, 6]]), Group(prompt=[1], responses=[[2]])])

    def op(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return tree_attention(
            *qkv,
            tree.subtree_end,
            position_ids=tree.position_ids,
            window=window,
            softcap=softcap,
            return_lse=True,
            backend=backend,
        )

    with small_blocks():
        assert torch.autograd.gradcheck(op, inputs(tree, (2, 1), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "torch", CPU])
def test_precision_follows_the_dtype(dtype: torch.dtype, backend: str) -> None:
    """Half inputs are computed in float32: what is lost is the rounding of inputs and results, no more."""
    leaves = inputs(TREE, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found, truth = (
        tree_attention(*x, TREE.subtree_end, return_lse=True, backend=b)
        for x, b in ((leaves, backend), (exact, "reference"))
    )
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert_near(found[0], truth[0], 1 if dtype != torch.float32 else 16)
    assert_near(found[1], truth[1], 16)
    for a, b in zip(gradients(found[:1], leaves), gradients(truth[:1], exact), strict=True):
        assert a.dtype == dtype
        assert_near(a, b, 4 if dtype != torch.float32 else 32)  # Δ is taken from the rounded output


def test_opcheck() -> None:
    """Schema, fake implementation, autograd registration and ahead-of-time tracing of both ops."""
    q, k, v = inputs(TREE, size=2)
    rows = torch.tensor([4, 0, 7])
    ops = torch.ops.tuna_kernels
    for arguments in (
        (q, k, v, TREE.subtree_end, None, None, None, 0.5, None, "torch"),
        (q[:, :, :3], k, v, TREE.subtree_end, rows, TREE.position_ids, 3, 0.5, 2.0, "torch"),
    ):
        torch.library.opcheck(ops.tree_attention.default, arguments)
        out, lse = ops.tree_attention(*arguments)
        detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        for grad_lse in (None, torch.ones_like(lse)):
            torch.library.opcheck(
                ops.tree_attention_backward.default,
                (
                    *detached[:-1],
                    out.detach(),
                    lse.detach(),
                    torch.ones_like(out),
                    grad_lse,
                    "torch",
                ),
                test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
            )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, tree: PackedTree) -> Tensor:
        out, lse = tree_attention(
            q, k, v, tree.subtree_end, position_ids=tree.position_ids, window=4, softcap=3.0, return_lse=True
        )
        return (out * out).sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tree in (TREE, pack_groups([Group(prompt=[1, 2], responses=[[3], [4, 5]])])):
        leaves = inputs(tree)
        for a, b in zip(
            torch.autograd.grad(compiled(*leaves, tree), leaves),
            torch.autograd.grad(loss(*leaves, tree), leaves),
            strict=True,
        ):
            assert_near(a, b)


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_a_group_gets_the_same_bits_alone_and_in_company(backend: str) -> None:
    """Blocks never cross a group and do not depend on what is packed beside it."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(40, [150, 30, 300]), (90, [20, 20, 20]), (7, [3, 2])]
    forest = [
        Group(
            prompt=torch.randint(0, 9, (prompt,), generator=generator).tolist(),
            responses=[torch.randint(0, 9, (n,), generator=generator).tolist() for n in responses],
        )
        for prompt, responses in lengths
    ]
    packed = pack_groups(forest)
    leaves = inputs(packed, (3, 1), 16, torch.float32)
    upstream = torch.randn(leaves[0].shape, generator=generator)
    together = [
        (out := tree_attention(*leaves, packed.subtree_end, backend=backend)),
        *torch.autograd.grad(out, leaves, upstream),
    ]
    for g, group in enumerate(forest):
        part = slice(*packed.group_rows_host[g : g + 2].tolist())
        own = [x.detach()[:, :, part].requires_grad_() for x in leaves]
        out = tree_attention(*own, pack_groups([group]).subtree_end, backend=backend)
        for alone, all_of_it in zip([out, *torch.autograd.grad(out, own, upstream[:, :, part])], together, strict=True):
            assert torch.equal(alone, all_of_it[:, :, part])


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_keys_hidden_tile_by_tile(backend: str) -> None:
    """A window over two merged branches, one 600 tokens deeper: for the deep one a whole first tile of 512 keys,
    the unit of the CPU flash kernel, is hidden."""
    deep = [1] * 600
    tree = pack_groups([Group(prompt=[0] * 601, responses=[[*deep, 1], [*deep, 2], [3]])])
    plan = block_plan.plan_for(tree.subtree_end, None, tree.position_ids, 520, torch.device("cpu"))
    assert any(b.hidden is not None and b.open == 0 and b.hidden[:, :512].all(1).any() for b in plan.blocks)
    leaves = inputs(tree, (2, 1), 4, torch.float32)
    arguments = {"position_ids": tree.position_ids, "window": 520, "return_lse": True}
    found, expected = (
        tree_attention(*leaves, tree.subtree_end, **arguments, backend=b) for b in (backend, "reference")
    )
    for a, b in zip(
        (*found, *gradients(found[:1], leaves)), (*expected, *gradients(expected[:1], leaves)), strict=True
    ):
        assert_near(a, b)


def test_work_is_that_of_groups_and_branches() -> None:
    """Scores computed: within 1.5 times those the rule shows, and far from the square of the packed row."""
    prompt, responses, length = 80, 5, 250
    group = Group(prompt=[0] * prompt, responses=[[i, *[9] * (length - 1)] for i in range(responses)])
    tree = pack_groups([group] * 4)
    plan = block_plan.plan_for(tree.subtree_end, None, None, None, torch.device("cpu"))
    computed = sum(
        (block.stop - block.start) * sum(stop - start for start, stop in block.keys) for block in plan.blocks
    )
    whole = 4 * (prompt**2 / 2 + responses * length * (prompt + length / 2))
    assert whole < computed < 1.5 * whole
    assert computed < tree.num_tokens**2 / 10
    for block in plan.blocks:
        first, last = (np.searchsorted(tree.group_rows_host, row, "right") for row in (block.start, block.stop - 1))
        assert first == last, "a block crosses a group"


def test_tiny_branches_are_merged() -> None:
    """Hundreds of one-token branches are no hundreds of blocks."""
    tree = pack_groups([Group(prompt=[0], responses=[[i] for i in range(300)])])
    plan = block_plan.plan_for(tree.subtree_end, None, None, None, torch.device("cpu"))
    assert len(plan.blocks) <= 6


def test_a_window_of_one_sees_only_itself() -> None:
    """The narrowest window: out is v, lse the row's own score. No row can see nothing."""
    q, k, v = inputs(TREE, (2, 2), dtype=torch.float32)
    for backend in ("reference", "torch", *([] if NO_NATIVE_CODE else ["cpu"])):
        out, lse = tree_attention(
            q,
            k,
            v,
            TREE.subtree_end,
            position_ids=TREE.position_ids,
            window=1,
            return_lse=True,
            backend=backend,
        )
        assert_near(out, v)
        assert_near(lse, (q * k).sum(-1) / math.sqrt(q.shape[-1]))


def test_alignment_padding_sees_only_itself() -> None:
    """Rows with subtree_end[j] = j + 1 behind the tree change nothing before them."""
    q, k, v = inputs(TREE)
    padded = [torch.cat([x, torch.full_like(x[:, :, :3], 1e4)], dim=2) for x in (q, k, v)]
    total = TREE.num_tokens
    end = torch.cat([TREE.subtree_end, torch.arange(total + 1, total + 4)])
    out = tree_attention(*padded, end)
    assert torch.equal(out[:, :, :total], tree_attention(q, k, v, TREE.subtree_end))
    assert_near(out[:, :, total:], padded[2][:, :, total:].repeat_interleave(2, dim=1))


def test_chosen_queries_are_rows_of_the_whole_answer() -> None:
    q, k, v = inputs(TREE)
    rows = torch.tensor([9, 2, 2, TREE.num_tokens - 1, 0])
    whole = tree_attention(q, k, v, TREE.subtree_end)
    assert_near(tree_attention(q[:, :, rows], k, v, TREE.subtree_end, query_rows=rows), whole[:, :, rows])


def test_strided_and_expanded_inputs() -> None:
    """The layouts models hand over: transposed heads, one key head expanded to many, a batch expanded from
    one."""
    q, k, v = inputs(TREE, (4, 1))
    plain = tree_attention(q, k, v, TREE.subtree_end)
    strided = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    expanded = tree_attention(strided, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1), TREE.subtree_end)
    assert_near(expanded, plain)
    for a, b in zip(
        torch.autograd.grad(expanded.sum(), [strided, k, v]),
        torch.autograd.grad(plain.sum(), [q, k, v]),
        strict=True,
    ):
        assert_near(a, b)
    batch = tree_attention(*(x.expand(3, -1, -1, -1) for x in (q, k, v)), TREE.subtree_end)
    assert torch.equal(batch, plain.expand(3, -1, -1, -1))


@pytest.mark.parametrize("backend", ["reference", "torch", CPU])
def test_empty_trees_and_no_queries(backend: str) -> None:
    nothing = torch.zeros(1, 2, 0, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    out, lse = tree_attention(nothing, nothing, nothing, none, return_lse=True, backend=backend)
    assert out.shape == (1, 2, 0, 3) and lse.shape == (1, 2, 0)
    out.sum().backward()
    q, k, v = inputs(TREE, dtype=torch.float32)
    out = tree_attention(q[:, :, :0], k, v, TREE.subtree_end, query_rows=none, backend=backend)
    assert out.shape == (1, 4, 0, 3)
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), [k, v]))


def test_only_inputs_and_results_are_kept_for_backward() -> None:
    """No mask, no gathered copy of keys: q, k, v, out, lse and the integers of the tree."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    q, k, v = inputs(TREE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = tree_attention(q, k, v, TREE.subtree_end, return_lse=True)
    allowed = sum(x.numel() * x.element_size() for x in (q, k, v, out, lse, TREE.subtree_end))
    assert 0 < sum(kept.values()) <= allowed


def test_a_changed_tree_never_meets_an_old_plan() -> None:
    """Plans are kept by content: writing into the array in place changes the answer."""
    q, k, v = inputs(TREE)
    end = TREE.subtree_end.clone()
    before = tree_attention(q, k, v, end)
    end.copy_(torch.arange(1, TREE.num_tokens + 1))
    assert not torch.equal(tree_attention(q, k, v, end), before)
    assert_near(tree_attention(q, k, v, end), v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_casts_inputs_and_nothing_inside(backend: str) -> None:
    """Under autocast the rotary product leaves q and k in float32 and v in bfloat16: all are cast, as for
    plain attention; the float32 arithmetic on them stays float32, in forward and backward."""
    q, k, v = inputs(TREE, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = tree_attention(q, k, v.bfloat16(), TREE.subtree_end, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=backend == "torch"):  # autograd has no guard
        found = torch.autograd.grad(out.float().square().sum(), [q, k, v])
    assert out.dtype == torch.bfloat16
    cast = [x.bfloat16() for x in (q, k, v)]
    expected = tree_attention(*cast, TREE.subtree_end, backend=backend)
    assert torch.equal(out, expected)
    for a, b in zip(found, torch.autograd.grad(expected.float().square().sum(), [q, k, v]), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused() -> None:
    q, k, v = inputs(TREE)
    (first,) = torch.autograd.grad(tree_attention(q, k, v, TREE.subtree_end).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), k)
