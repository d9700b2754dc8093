"""Tree attention's Triton kernels: equal to the oracle, forward and backward, for every tree, flag, layout and dtype;
the same bits every time; no block visited that holds no work.

Blocks are 16 rows here, so that small trees take every path. Trees have some 60 rows: four blocks each way.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton.device import DEVICE
from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna.compare.memory_meter import allocator_peak
from tuna_kernels import workspace_bytes
from tuna_kernels.attention import bounds, reference
from tuna_kernels.attention.call import AttentionCall
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.attention.triton import launches
from tuna_kernels.gpu import launch
from tuna_kernels.gpu.static_case import Config
from tuna_kernels.tree import Group, PackedTree, pack_groups

BLOCK = 16

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on

TREE = pack_groups(
    [
        Group(prompt=[1] * 21, responses=[[4, 5, 6, *[7] * 9], [4, 5, 8], [4, 5], [9] * 6]),
        Group(prompt=[1], responses=[[2, 3, 4, 5, 6]]),
        Group(prompt=[5, 6] * 4, responses=[[1, 2], [3, 4, 5, 6, 7, 8], [3, 4, 1], [3, 4, 1]]),
    ]
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Config({"BLOCK_M": BLOCK, "BLOCK_N": BLOCK}, num_warps=4, num_stages=2)
    monkeypatch.setattr(launches, "candidates", lambda *_, **__: (small,))


tokens = st.integers(0, 2)


@st.composite
def forests(draw: st.DrawFn) -> list[Group]:
    """One to three groups; candidates that share a beginning, repeat, or are one another's prefix; k from 1."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(tokens, min_size=1, max_size=4)) * draw(st.integers(1, 7))
        stem = draw(st.lists(tokens, max_size=3)) * draw(st.integers(1, 5))
        response = st.lists(tokens, min_size=1, max_size=5).map(lambda tail, stem=stem: [*stem, *tail])
        responses = draw(st.lists(response | st.lists(tokens, min_size=1, max_size=20), min_size=1, max_size=4))
        if draw(st.booleans()):
            responses.append(responses[0])
        if draw(st.booleans()):
            responses.append(responses[0][: max(1, len(responses[0]) // 2)])
        found.append(Group(prompt=prompt, responses=responses))
    return found


def inputs(
    total: int,
    queries: int,
    heads: tuple[int, int] = (4, 2),
    size: int = 16,
    values: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v as models hand them over: views of [B, T, H, d] memory."""
    generator = torch.Generator().manual_seed(seed + total)
    shapes = (
        (batch, queries, heads[0], size),
        (batch, total, heads[1], size),
        (batch, total, heads[1], values or size),
    )
    return [
        torch.randn(shape, generator=generator).to(DEVICE, dtype).transpose(1, 2).requires_grad_() for shape in shapes
    ]


def half_reference(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """What plain torch does in the inputs' own dtype, softmax in float32."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1).to(q.dtype) @ v, torch.logsumexp(scores, -1)


def upstream(outputs: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]


def assert_equals_oracle(
    leaves: list[Tensor],
    tree: PackedTree,
    *,
    rows: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    seeds: tuple[int, ...] = (7,),
    lse: bool = True,
    large: bool = False,
) -> None:
    """out, lse and, for every seed's upstream, the gradients: as good as plain torch in the same dtype.

    ``large``: scores of hundreds. The backward takes p from a score and a log-sum-exp in base 2, each rounded once by
    half a unit of its size: a relative error of p of up to that size in units, which plain torch does not make (it
    keeps p).
    """
    end, depth = tree.subtree_end.to(DEVICE), tree.position_ids.to(DEVICE)
    scale = leaves[0].shape[-1] ** -0.5 if scale is None else scale
    keywords: dict[str, Any] = {"query_rows": rows, "position_ids": depth, "window": window, "softcap": softcap}

    def run(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[list[Tensor]]:
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        outputs = function(*own)
        results = [[x.detach() for x in outputs]]
        kept = outputs if lse else outputs[:1]
        for seed in seeds:
            grads = [g.to(x.dtype) for g, x in zip(given_upstream[seed], kept, strict=False)]
            results.append(list(torch.autograd.grad(kept, own, grads, retain_graph=True)))
        return results

    def kernel(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return tree_attention(*qkv, end, scale=scale, return_lse=True, backend="triton", **keywords)

    def oracle(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return reference.tree_attention(AttentionCall(*qkv, end, rows, depth, window, scale, softcap))

    def plain(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return half_reference(*qkv, reference.visible(end, rows, depth, window), scale, softcap)

    dtype = leaves[0].dtype
    shape = oracle(*(x.detach() for x in leaves))
    given_upstream = {seed: upstream(shape, seed) for seed in seeds}
    found = run(kernel, dtype)
    truth = run(oracle, torch.float64)
    book = run(oracle if dtype == torch.float32 else plain, dtype)
    names = [["out", "lse"], *[["dq", "dk", "dv"]] * len(seeds)]
    for group in zip(found, book, truth, names, strict=True):
        for got, own, exact, name in zip(*group, strict=True):
            size = truth[0][1].abs().max().item() if large and name.startswith("d") else 0
            assert_as_good_as_reference(got, own, exact, name, units=16 + size)


@given(
    forest=forests(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    window=st.none() | st.integers(1, 24),
    softcap=st.none() | st.floats(0.5, 50),
    scale=st.none() | st.floats(0.05, 1.5),
    chosen=st.none() | st.lists(st.floats(0, 1, exclude_max=True), max_size=20),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    splits=st.sampled_from([1, 1, 3]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_trees_equal_the_oracle(
    forest: list[Group],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    scale: float | None,
    chosen: list[float] | None,
    dtype: torch.dtype,
    splits: int,
) -> None:
    """Output, log-sum-exp and all gradients, for trees, windows, caps and any choice and order of queries."""
    tree = pack_groups(forest)
    total = tree.num_tokens
    rows = None if chosen is None else torch.tensor([int(x * total) for x in chosen], dtype=torch.int64, device=DEVICE)
    leaves = inputs(total, total if rows is None else len(rows), heads, 8, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "_splits", lambda *_: splits)
        assert_equals_oracle(leaves, tree, rows=rows, window=window, softcap=softcap, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 16, 64, 80, 96, 128, 256])
def test_head_sizes(size: int, dtype: torch.dtype) -> None:
    assert_equals_oracle(inputs(TREE.num_tokens, TREE.num_tokens, (2, 1), size, dtype=dtype), TREE)


@pytest.mark.parametrize(("size", "values"), [(16, 40), (48, 16), (5, 33)])
def test_values_may_have_another_head_size(size: int, values: int) -> None:
    assert_equals_oracle(inputs(TREE.num_tokens, TREE.num_tokens, (2, 1), size, values), TREE)


@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 3), (6, 2), (6, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_head_groups_and_batches(heads: tuple[int, int], batch: int) -> None:
    assert_equals_oracle(inputs(TREE.num_tokens, TREE.num_tokens, heads, batch=batch), TREE, softcap=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.001, 20.0, -1.0])
def test_flat_and_peaked_scores(scale: float, dtype: torch.dtype) -> None:
    """All keys alike, one key taking all (scores of hundreds), scores turned around."""
    assert_equals_oracle(inputs(TREE.num_tokens, TREE.num_tokens, dtype=dtype), TREE, scale=scale, large=scale > 1)


@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 1e4])
def test_softcaps(softcap: float) -> None:
    """Far into saturation and far from it, where 1 - 2 / (1 + e^2x) alone would have no digits left."""
    assert_equals_oracle(inputs(TREE.num_tokens, TREE.num_tokens), TREE, softcap=softcap, scale=0.3)


@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 30, 10_000])
def test_windows_are_measured_in_depth(window: int) -> None:
    assert_equals_oracle(inputs(TREE.num_tokens, TREE.num_tokens), TREE, window=window)


def test_scores_that_rise_from_block_to_block() -> None:
    """Each later key block has a larger maximum, then each a smaller one: sums are rescaled every time."""
    tree = pack_groups([Group(prompt=[1] * 40, responses=[[2] * 40])])
    for sign in (1, -1):
        q, k, v = inputs(80, 80, (1, 1))
        ramp = torch.arange(80, device=DEVICE)[:, None] / 10 * sign
        with torch.no_grad():
            q.fill_(0.5)
            k.copy_(ramp.expand_as(k[0, 0]))
        assert_equals_oracle([q, k, v], tree)


def test_gradients_again_with_another_upstream() -> None:
    """A second backward from the same graph; and one from out alone, where no gradient of lse comes."""
    leaves = inputs(TREE.num_tokens, TREE.num_tokens)
    assert_equals_oracle(leaves, TREE, seeds=(1, 2, 1))
    assert_equals_oracle(leaves, TREE, lse=False)


def test_gradient_of_lse_alone() -> None:
    q, k, v = inputs(TREE.num_tokens, TREE.num_tokens)
    grads = []
    for backend in ("triton", "reference"):
        _, lse = tree_attention(q, k, v, TREE.subtree_end.to(DEVICE), return_lse=True, backend=backend)
        grads.append(torch.autograd.grad(lse.square().sum(), [q, k, v], materialize_grads=True))
    assert not grads[0][2].any()
    for found, expected in zip(*grads, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_layouts() -> None:
    """Rows apart, columns apart, a head expanded to many, an upstream expanded from one number."""
    total = TREE.num_tokens
    q, k, v = (x.detach() for x in inputs(total, total, (4, 1)))
    sparse = torch.zeros(1, 4, total, 32, device=DEVICE)[..., ::2].copy_(q)
    shifted = torch.zeros(1, 1, total + 3, 19, device=DEVICE)[:, :, 3:, 3:].copy_(k)
    swapped = v.transpose(2, 3).contiguous().transpose(2, 3)
    end = TREE.subtree_end.to(DEVICE)

    def results(*qkv: Tensor, backend: str) -> tuple[Tensor, ...]:
        own = [x.requires_grad_() for x in qkv]
        out = tree_attention(own[0], *(x.expand(-1, 4, -1, -1) for x in own[1:]), end, backend=backend)
        return (out, *torch.autograd.grad(out.sum(), own))

    found = results(sparse, shifted, swapped, backend="triton")
    for a, b in zip(found, results(q, k, v, backend="reference"), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="the memory is virtual")
def test_offsets_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2^26 elements apart: row 40 lies beyond 2^31. Only the pages of the rows themselves are ever touched."""
    from triton.runtime import interpreter

    # it would copy all memory of every argument back to itself
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    total, stride = 48, 1 << 26
    tree = pack_groups([Group(prompt=[1] * 40, responses=[[2] * 8])])
    near = [x.detach().half() for x in inputs(total, total, (1, 1))]
    far = [
        virtual_memory(total * stride).as_strided((1, 1, total, 16), (stride, stride, stride, 1)).copy_(x) for x in near
    ]
    results = []
    for q, k, v in (far, near):
        call = AttentionCall(q, k, v, tree.subtree_end, scale=0.25)
        result = launches.forward(call)
        # gradients laid out near, whatever the inputs
        results.append((*result, *launches.backward(call, result, near[0], None)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def virtual_memory(elements: int) -> Tensor:
    """float16 zeros that take no memory before they are touched."""
    pages = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(pages, dtype=torch.float16)


def test_empty_trees_and_no_queries() -> None:
    nothing = torch.zeros(1, 2, 0, 3, device=DEVICE, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out, lse = tree_attention(nothing, nothing, nothing, none, return_lse=True, backend="triton")
    assert out.shape == (1, 2, 0, 3) and lse.shape == (1, 2, 0)
    out.sum().backward()
    q, k, v = inputs(TREE.num_tokens, TREE.num_tokens)
    out = tree_attention(q[:, :, :0], k, v, TREE.subtree_end.to(DEVICE), query_rows=none, backend="triton")
    assert out.shape == (1, 4, 0, 16)
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), [k, v]))


def test_a_key_that_no_query_sees_gets_gradient_zero() -> None:
    """Queries of the first group only: keys of the others are in no list, and their gradients are written all the
    same."""
    rows = torch.tensor([3, 20, 25], device=DEVICE)
    q, k, v = inputs(TREE.num_tokens, 3)
    for splits in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches, "_splits", lambda *_, splits=splits: splits)
            out = tree_attention(q, k, v, TREE.subtree_end.to(DEVICE), query_rows=rows, backend="triton")
            dk, dv = torch.autograd.grad(out.sum(), [k, v])
        assert not dk[:, :, 26:].any() and not dv[:, :, 26:].any() and dv[:, :, :21].any()


def test_blocks_without_work_are_not_visited() -> None:
    """NaN in every key block that a query block cannot see: one visit, even a masked one, would spread it."""
    prompt, response = BLOCK, 2 * BLOCK
    tree = pack_groups([Group(prompt=[0] * prompt, responses=[[i, *[9] * (response - 1)] for i in range(3)])] * 2)
    end, total = tree.subtree_end.to(DEVICE), tree.num_tokens
    first = prompt + response  # the second response of the first group
    rows = torch.arange(first, first + response, device=DEVICE)
    q, k, v = inputs(total, response, (2, 1))
    seen = reference.visible(end, rows, None, None).any(0)
    expected = tree_attention(q, k, v, end, query_rows=rows, backend="triton")
    poisoned = [x.detach().masked_fill(~seen[:, None], float("nan")).requires_grad_() for x in (k, v)]
    out = tree_attention(q, *poisoned, end, query_rows=rows, backend="triton")
    assert torch.equal(out, expected)
    dq, dk, dv = torch.autograd.grad(out.sum(), [q, *poisoned])
    for grad in (dq, dk, dv):
        assert grad.isfinite().all()


def test_full_blocks_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every key is seen by every query the kernels never ask the rule: a wrong subtree_end there changes
    nothing."""
    tree = pack_groups([Group(prompt=[0] * 64, responses=[[1] * 32, [2] * 32])])
    end = tree.subtree_end.to(DEVICE)
    rows = torch.arange(96, 128, device=DEVICE)
    leaves = inputs(128, 32, (2, 1))

    def results() -> list[Tensor]:
        out = tree_attention(*leaves, end, query_rows=rows, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    expected = results()
    blocks = bounds.block_map(end, rows, None, None)
    assert blocks.lists(BLOCK, BLOCK).full.tolist() == [4, 5]
    blocks.end[:64] = 0  # the prompt: its lists are made already
    for a, b in zip(results(), expected, strict=True):
        assert torch.equal(a, b)


def test_splits_add_up_to_the_same_gradients() -> None:
    """More splits than a list has blocks, as many, and fewer; the same bits each time."""
    tree = pack_groups([Group(prompt=[0] * 20, responses=[[i, *[9] * 15] for i in range(5)])])
    leaves = inputs(tree.num_tokens, tree.num_tokens, dtype=torch.bfloat16)
    for splits in (1, 2, 5, 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches, "_splits", lambda *_, splits=splits: splits)
            assert_equals_oracle(leaves, tree)


def test_splits_fill_the_gpu_and_no_more() -> None:
    """108 multiprocessors: few key blocks are split, many are not, none into more parts than there are query blocks."""
    assert launches._splits(2048, 64, 108) == 1
    assert launches._splits(864, 64, 108) == 1
    assert launches._splits(432, 64, 108) == 2
    assert launches._splits(16, 64, 108) == launches.MAX_SPLITS
    assert launches._splits(16, 3, 108) == 3
    assert launches._splits(16, 0, 108) == 1


@pytest.mark.skipif(DEVICE != "cpu", reason="it is measured in CPU memory")
@pytest.mark.parametrize("splits", [1, 7])
def test_stated_workspace_is_what_is_allocated(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, the tree's lists made on the way, beyond results and the upstream they are given."""
    monkeypatch.setattr(launches, "_splits", lambda *_: splits)
    tree = pack_groups([Group([1] * 70, [[i, *[7] * 22] for i in range(4)])])
    total, heads, kv_heads, size = tree.num_tokens, 2, 1, 64
    shape = {"rows": total, "heads": heads, "kv_heads": kv_heads, "head_size": size, "longest": 93}
    stated = workspace_bytes("tree_attention", shape, torch.float32, "triton")
    q, k, v = inputs(total, total, (heads, kv_heads), size)
    given = torch.randn(1, total, heads, size).transpose(1, 2)

    def call() -> object:
        out = tree_attention(q, k, v, tree.subtree_end.clone(), backend="triton")
        return torch.autograd.grad(out, (q, k, v), given)

    taken = allocator_peak(call) - 4 * total * (2 * heads * size + 2 * kv_heads * size + heads)
    assert taken <= stated <= 1.5 * taken + (8 << 10)


def test_opcheck() -> None:
    """Schema, fake implementation, autograd registration and ahead-of-time tracing with this backend."""
    total = TREE.num_tokens
    q, k, v = inputs(total, total, (2, 1))
    end, depth = TREE.subtree_end.to(DEVICE), TREE.position_ids.to(DEVICE)
    rows = torch.tensor([40, 0, 7], device=DEVICE)
    q = q.detach()[:, :, :3].requires_grad_()
    arguments = (q, k, v, end, rows, depth, 3, 0.5, 2.0, "triton")
    torch.library.opcheck(torch.ops.tuna_kernels.tree_attention.default, arguments)


def test_compiles_without_graph_breaks() -> None:
    end = TREE.subtree_end.to(DEVICE)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = tree_attention(q, k, v, end, softcap=3.0, return_lse=True, backend="triton")
        return (out * out).sum() + lse.sum()

    leaves = inputs(TREE.num_tokens, TREE.num_tokens, (2, 1))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU values are not looked at")
def test_wrong_values_are_named() -> None:
    q, k, v = inputs(TREE.num_tokens, TREE.num_tokens)
    end = TREE.subtree_end
    with pytest.raises(ValueError, match=r"subtree_end\[0\] = 0 is outside"):
        tree_attention(q, k, v, torch.zeros_like(end), backend="triton")
    rows = torch.full((TREE.num_tokens,), TREE.num_tokens)
    with pytest.raises(IndexError, match=r"query_rows\[0\]"):
        tree_attention(q, k, v, end, query_rows=rows, backend="triton")


def test_what_is_not_served_is_named() -> None:
    q, k, v = inputs(TREE.num_tokens, TREE.num_tokens, size=257)
    end = TREE.subtree_end.to(DEVICE)
    with pytest.raises(RuntimeError, match="head size of q and k is 257, above 256"):
        tree_attention(q, k, v, end, backend="triton")
    with pytest.raises(RuntimeError, match="head size of v is 257"):
        tree_attention(q[..., :8], k[..., :8], v, end, backend="triton")
    with pytest.raises(RuntimeError, match=r"does not support torch\.float64"):
        tree_attention(q.double(), k.double(), v.double(), end, backend="triton")


def test_the_environment_may_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = inputs(TREE.num_tokens, TREE.num_tokens)
    end = TREE.subtree_end.to(DEVICE)
    monkeypatch.setenv("TUNA_KERNELS_BACKEND", "triton")
    asked = tree_attention(*leaves, end)
    assert torch.equal(asked, tree_attention(*leaves, end, backend="triton"))
    with pytest.raises(RuntimeError, match="TUNA_KERNELS_BACKEND = 'triton' does not support"):
        tree_attention(*(x.double() for x in leaves), end)


@pytest.mark.parametrize("quickest", [0, 1, 2])
def test_whichever_configuration_tuning_takes_equals_the_oracle(
    quickest: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = [(BLOCK, BLOCK), (2 * BLOCK, BLOCK), (BLOCK, 2 * BLOCK)]
    configs = tuple(Config({"BLOCK_M": m, "BLOCK_N": n}) for m, n in sizes)
    taken: list[Config] = []

    def milliseconds(run: Any) -> float:
        run()
        taken.append(run.args[0])
        return float(run.args[0] != configs[quickest])

    monkeypatch.setattr(launches, "candidates", lambda *_, **__: configs)
    monkeypatch.setattr(launch, "_milliseconds", milliseconds)
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch._tuned.cache_clear()
    assert_equals_oracle(inputs(TREE.num_tokens, TREE.num_tokens), TREE)
    assert taken == [*configs] * 3  # forward, dq and dkv, once each
    assert set(json.loads(launch.cache_file().read_text()).values()) == {quickest}
    launch._tuned.cache_clear()
