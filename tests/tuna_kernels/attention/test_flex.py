"""The FlexAttention route: its masks are the rule, its blocks those of PyTorch's builder, its answers the oracle's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tests.tuna_kernels.attention.test_tree_attention import TREE, assert_near, groups, inputs
from tuna_kernels.attention import flex
from tuna_kernels.attention.bounds import block_map
from tuna_kernels.attention.reference import visible
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.tree import Group, pack_groups


@given(
    forest=groups,
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    window=st.none() | st.integers(1, 8),
    softcap=st.none() | st.floats(0.5, 20),
    rows=st.none() | st.lists(st.floats(0, 1, exclude_max=True), max_size=9),
)
@settings(max_examples=40, deadline=None)
def test_flex_equals_reference(
    forest: list[Group],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    rows: list[float] | None,
) -> None:
    tree = pack_groups(forest)
    q, k, v = (x.detach() for x in inputs(tree, heads, 16, torch.float32))
    chosen = None
    if rows is not None:
        chosen = torch.tensor([int(x * tree.num_tokens) for x in rows], dtype=torch.int64)
        q = q[:, :, chosen]
    found, expected = (
        tree_attention(
            q,
            k,
            v,
            tree.subtree_end,
            query_rows=chosen,
            position_ids=tree.position_ids,
            window=window,
            softcap=softcap,
            scale=0.4,
            return_lse=True,
            backend=backend,
        )
        for backend in ("flex", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert_near(a, b)


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("chosen", [False, True])
def test_blocks_are_those_of_the_mask(window: int | None, chosen: bool) -> None:
    """PyTorch's builder evaluates the mask T × T; ours comes from bounds. Without a window they agree exactly, with one
    ours may visit more, never less, and calls nothing full that is not."""
    tree = pack_groups(
        [
            Group(prompt=[1] * 300, responses=[[2] * 150, [3] * 200, [4] * 100]),
            Group(prompt=[5] * 70, responses=[[6] * 90]),
        ]
    )
    rows = torch.arange(0, tree.num_tokens, 3).flip(0) if chosen else None
    blocks = block_map(tree.subtree_end, rows, tree.position_ids, window)
    mask = flex.mask_function(blocks)
    ours = flex.block_mask(blocks)
    theirs = create_block_mask(mask, 1, 1, blocks.queries, tree.num_tokens, device="cpu")
    seen = visible(tree.subtree_end, blocks.rows, tree.position_ids, window)
    index = [torch.arange(n) for n in seen.shape]
    zero = torch.tensor(0)
    assert torch.equal(mask(zero, zero, index[0][:, None], index[1][None]), seen)

    def dense(counts: Tensor, indices: Tensor) -> Tensor:
        found = torch.zeros(indices.shape[2:], dtype=torch.bool)
        for i, count in enumerate(counts[0, 0].tolist()):
            found[i, indices[0, 0, i, :count].long()] = True
        return found

    partial, full = (
        [dense(m.kv_num_blocks, m.kv_indices), dense(m.full_kv_num_blocks, m.full_kv_indices)] for m in (ours, theirs)
    )
    their_partial, their_full = full
    our_partial, our_full = partial
    whole_tiles = their_full.clone()  # PyTorch calls a ragged last block full, we mask it
    if blocks.queries % flex.BLOCK:
        whole_tiles[-1] = False
    if tree.num_tokens % flex.BLOCK:
        whole_tiles[:, -1] = False
    if window is None:
        assert torch.equal(our_full, whole_tiles)
        assert torch.equal(our_partial | our_full, their_partial | their_full)
    assert not (our_full & ~their_full).any()
    assert not ((their_partial | their_full) & ~(our_partial | our_full)).any()
    assert not (our_partial & our_full).any()
    # the transposed lists, which FlexAttention's backward walks
    assert int(ours.q_num_blocks.sum()) == int(our_partial.sum())
    assert flex.block_mask(blocks) is ours


def test_backward_on_cpu_is_refused() -> None:
    q, k, v = inputs(TREE, (2, 1), 16, torch.float32)
    with pytest.raises(
        RuntimeError, match="backend = 'flex' does not support this call: FlexAttention has no backward"
    ):
        tree_attention(q, k, v, TREE.subtree_end, backend="flex")
    with torch.no_grad():
        tree_attention(q, k, v, TREE.subtree_end, backend="flex")
    with pytest.raises(RuntimeError, match=r"FlexAttention does not support torch\.float64"):
        tree_attention(*(x.detach().double() for x in (q, k, v)), TREE.subtree_end, backend="flex")


def test_values_are_checked() -> None:
    q, k, v = (x.detach() for x in inputs(TREE, (2, 1), 16, torch.float32))
    with pytest.raises(ValueError, match=r"subtree_end\[0\]"):
        tree_attention(q, k, v, torch.zeros_like(TREE.subtree_end), backend="flex")
