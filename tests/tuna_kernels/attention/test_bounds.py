"""Block bounds of tree attention: a pair of blocks is visited exactly when it holds work, and unmasked exactly when it
is all work; by brute force over the rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tuna_kernels.attention.test_tree_attention import TREE, groups
from tuna_kernels.attention import bounds
from tuna_kernels.attention.bounds import BlockLists, BlockMap, block_map
from tuna_kernels.attention.reference import visible
from tuna_kernels.tree import Group, Share, pack_groups

choices = st.none() | st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20)
sizes = st.sampled_from([1, 2, 4, 8])


def by_blocks(seen: Tensor, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """Bool [query blocks, key blocks]: some pair seen; a whole block, all of it seen."""
    live, full = [], []
    for rows in seen.split(block_m):
        tiles = rows.split(block_n, dim=1)
        live.append([bool(tile.any()) for tile in tiles])
        full.append([bool(tile.all()) and tile.shape == (block_m, block_n) for tile in tiles])
    return torch.tensor(live), torch.tensor(full)


def sorted_rows(tree_size: int, chosen: list[float] | None) -> tuple[Tensor | None, Tensor | None]:
    """(query_rows in the order given, the same ascending)."""
    if chosen is None:
        return None, None
    rows = torch.tensor([int(x * tree_size) for x in chosen])
    return rows, rows.sort().values


@given(groups, st.sampled_from(["tree", "prompt", "none"]), sizes, sizes, choices)
@settings(max_examples=150, deadline=None)
def test_blocks_visited_are_those_with_work(
    forest: list[Group], share: Share, block_m: int, block_n: int, chosen: list[float] | None
) -> None:
    tree = pack_groups(forest, share=share)
    rows, ascending = sorted_rows(tree.num_tokens, chosen)
    live, full = block_map(tree.subtree_end, rows, None, None).pairs(block_m, block_n)
    true_live, true_full = by_blocks(visible(tree.subtree_end, ascending, None, None), block_m, block_n)
    assert torch.equal(live, true_live)
    assert torch.equal(full, true_full)


@given(groups, sizes, sizes, choices, st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_a_window_never_loses_work_or_a_mask(
    forest: list[Group], block_m: int, block_n: int, chosen: list[float] | None, window: int
) -> None:
    """Judged by least and greatest depths: no live block missed, none called full that is not."""
    tree = pack_groups(forest)
    rows, ascending = sorted_rows(tree.num_tokens, chosen)
    seen = visible(tree.subtree_end, ascending, tree.position_ids, window)
    live, full = block_map(tree.subtree_end, rows, tree.position_ids, window).pairs(block_m, block_n)
    true_live, true_full = by_blocks(seen, block_m, block_n)
    assert not (true_live & ~live).any()
    assert not (full & ~true_full).any()


@pytest.mark.parametrize("window", [1, 5, 8, 16, 17, 40])
def test_a_window_over_a_chain_is_exact(window: int) -> None:
    """One long sequence: depths are rows, so least and greatest depths decide exactly."""
    tree = pack_groups([Group(prompt=[1] * 30, responses=[[2] * 34])])
    found = block_map(tree.subtree_end, None, tree.position_ids, window).pairs(8, 4)
    expected = by_blocks(visible(tree.subtree_end, None, tree.position_ids, window), 8, 4)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_window_counts_depth_not_rows() -> None:
    """The last of five branches is 40 packed rows from the prompt but 2 deep: the prompt stays in its window."""
    tree = pack_groups([Group(prompt=[0] * 8, responses=[[i, *[9] * 7] for i in range(5)])])
    live, _ = block_map(tree.subtree_end, None, tree.position_ids, 8).pairs(8, 8)
    assert live[5].tolist() == [True, False, False, False, False, True]


@given(groups, sizes, sizes, choices, st.none() | st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_lists_name_full_blocks_first_then_masked_ones(
    forest: list[Group], block_m: int, block_n: int, chosen: list[float] | None, window: int | None
) -> None:
    tree = pack_groups(forest)
    rows, _ = sorted_rows(tree.num_tokens, chosen)
    blocks = block_map(tree.subtree_end, rows, tree.position_ids, window)
    live, full = blocks.pairs(block_m, block_n)
    for lists, alive, whole in (
        (blocks.lists(block_m, block_n), live, full),
        (blocks.lists(block_m, block_n, of_keys=True), live.T, full.T),
    ):
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (lists.index, lists.full, lists.live))
        for i in range(len(alive)):
            n, m = int(lists.full[i]), int(lists.live[i])
            assert lists.index[i, :n].tolist() == whole[i].nonzero().flatten().tolist()
            assert lists.index[i, n:m].tolist() == (alive[i] & ~whole[i]).nonzero().flatten().tolist()


def test_work_of_many_candidates_is_that_of_their_own_sequences() -> None:
    """Blocks visited for a prompt of 256 and 16 responses of 128: the count by hand, not the square of the row."""
    tree = pack_groups([Group(prompt=[0] * 256, responses=[[i, *[99] * 127] for i in range(16)])])
    lists = block_map(tree.subtree_end, None, None, None).lists(64, 64)
    prompt, response = 4, 2
    alone = prompt * (prompt + 1) // 2 + 16 * (response * prompt + response * (response + 1) // 2)
    assert int(lists.live.sum()) == alone
    assert int(lists.full.sum()) == alone - prompt - 16 * response  # all but the diagonal need no mask
    assert alone < lists.index.numel() / 6


def test_queries_in_any_order_are_visited_in_the_order_of_their_rows() -> None:
    rows = torch.tensor([9, 2, 2, 25, 0])
    blocks = block_map(TREE.subtree_end, rows, None, None)
    assert blocks.rows is not None and blocks.order is not None
    assert blocks.rows.tolist() == [0, 2, 2, 9, 25]
    assert rows[blocks.order.long()].tolist() == blocks.rows.tolist()
    assert sorted(blocks.order.tolist()) == [0, 1, 2, 3, 4]


def test_maps_are_kept_and_a_changed_tree_gets_its_own() -> None:
    end, depth = TREE.subtree_end.clone(), TREE.position_ids.clone()
    first = block_map(end, None, depth, 3)
    assert block_map(end, None, depth, 3) is first
    assert block_map(end, None, depth, 4) is not first
    assert block_map(end, None, depth, None) is not first
    assert block_map(end.clone(), None, depth, 3) is not first
    end[0] = 1
    changed = block_map(end, None, depth, 3)
    assert changed is not first and changed.end[0] == 1
    assert isinstance(first.lists(4, 4), BlockLists) and first.lists(4, 4) is first.lists(4, 4)


def test_few_maps_are_kept_and_an_id_that_comes_back_is_no_old_tree() -> None:
    for length in range(1, 40):
        for _ in range(3):
            end = torch.full((length,), length)
            assert len(block_map(end, None, None, None).end) == length
            end = torch.arange(1, length + 1)  # may take the memory and the id of the one before
            assert block_map(end, None, None, None).end.tolist() == list(range(1, length + 1))
    assert len(bounds._kept) <= bounds.KEPT


def test_inference_tensors_are_never_kept() -> None:
    """Their changes leave no trace."""
    with torch.inference_mode():
        end = torch.tensor([3, 3, 3])
        before = block_map(end, None, None, None)
        end[0] = 1
        assert block_map(end, None, None, None).end.tolist() == [1, 3, 3]
        assert isinstance(before, BlockMap)
