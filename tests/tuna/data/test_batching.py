"""Laws of `tuna.data.batching`: an epoch sees every group exactly once, ranks agree, token budgets hold, a resumed
epoch is the rest of the same epoch, and batches that only keep ranks in step say so."""

from __future__ import annotations

from collections import Counter
from threading import Semaphore
from typing import Any

import numpy as np
import pytest
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from tuna.data.batching import WINDOW, GroupBatchSampler, group_loader
from tuna.data.tokenization import TokenizedGroup
from tuna_kernels import Group, pack_groups
from tuna_kernels.tree import tree_tokens


def some_groups(number: int, seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [
        Group(
            prompt=rng.integers(0, 9, rng.integers(1, 5)),
            responses=[rng.integers(0, 9, rng.integers(1, 6)) for _ in range(rng.integers(1, 4))],
        )
        for _ in range(number)
    ]


sizes = st.one_of(
    st.builds(lambda n: {"groups_per_batch": n}, st.integers(1, 5)),
    st.builds(lambda n: {"tokens_per_batch": n}, st.integers(25, 80)),
)


@given(
    number=st.integers(1, 40),
    size=sizes,
    world=st.integers(1, 5),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_group_once_and_as_many_batches_on_every_rank(
    number: int, size: dict[str, int], world: int, shuffle: bool, epoch: int
) -> None:
    groups = some_groups(number)
    samplers = [
        GroupBatchSampler(groups, **size, shuffle=shuffle, seed=3, rank=rank, world_size=world) for rank in range(world)
    ]
    batches = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
    assert {len(own) for own in batches} == {len(samplers[0])}
    seen = Counter(group for own in batches for batch in own for group in batch)
    assert seen == Counter(range(number))
    tokens = tree_tokens(groups)
    for batch in (batch for own in batches for batch in own):
        assert len(batch) <= size.get("groups_per_batch", number)
        assert tokens[batch].sum() <= size.get("tokens_per_batch", tokens.sum())


def test_epochs_differ_and_repeat_from_the_seed() -> None:
    groups = some_groups(30)
    for size in ({"groups_per_batch": 2}, {"tokens_per_batch": 40}):
        sampler = GroupBatchSampler(groups, **size, seed=1)
        again = GroupBatchSampler(groups, **size, seed=1)
        other = GroupBatchSampler(groups, **size, seed=2)
        first = list(sampler)
        assert first == list(again)
        assert first != list(other)
        sampler.set_epoch(1)
        assert first != list(sampler)


def test_leftover_groups_are_spread_over_the_ranks() -> None:
    # 10 groups, 4 a batch, 2 ranks: 8 in the first round, one each in the second.
    samplers = [GroupBatchSampler(some_groups(10), groups_per_batch=4, rank=rank, world_size=2) for rank in (0, 1)]
    assert [[len(batch) for batch in sampler] for sampler in samplers] == [[4, 1], [4, 1]]


def test_windows_leave_no_group_out() -> None:
    groups = [Group([1, 2], [[3] * (1 + i % 7)]) for i in range(2 * WINDOW + 5)]
    sampler = GroupBatchSampler(groups, tokens_per_batch=30)
    assert Counter(group for batch in sampler for group in batch) == Counter(range(len(groups)))


@pytest.mark.parametrize("skip", [1, 3])
def test_skipping_the_first_batches_gives_the_rest_of_the_epoch(skip: int) -> None:
    dataset = [TokenizedGroup(str(i), group, 0) for i, group in enumerate(some_groups(11))]
    loader = group_loader(dataset, GroupBatchSampler([item.group for item in dataset], groups_per_batch=2))
    loader.set_epoch(1)
    whole = [batch["input_ids"].tolist() for batch in loader]
    rest = [batch["input_ids"].tolist() for batch in skip_first_batches(loader, skip)]
    assert rest == whole[skip:]


def test_the_next_batch_is_packed_while_one_is_computed() -> None:
    dataset = [TokenizedGroup(str(i), group, 0) for i, group in enumerate(some_groups(6))]
    loader = group_loader(dataset, GroupBatchSampler([item.group for item in dataset], groups_per_batch=2))
    pack, packed = loader.collate_fn, Semaphore(0)

    def counting(items: list[TokenizedGroup]) -> Any:
        batch = pack(items)
        packed.release()
        return batch

    loader.collate_fn = counting
    batches = iter(loader)
    next(batches)
    assert packed.acquire(timeout=60) and packed.acquire(timeout=60)  # nobody has asked for the second one yet
    assert len(list(batches)) == 2


def test_what_goes_wrong_in_packing_is_raised_where_the_batch_is_asked_for() -> None:
    dataset = [TokenizedGroup(str(i), group, 0) for i, group in enumerate(some_groups(2))]
    loader = group_loader(dataset[:1], GroupBatchSampler([item.group for item in dataset], groups_per_batch=1))
    with pytest.raises(IndexError):
        list(loader)


def test_loader_packs_the_groups_and_marks_what_only_keeps_ranks_in_step() -> None:
    groups = [Group([1, 2, 3], [[4, 5], [4, 6]], ranks=[0, 1]), Group([1], [[2]])]
    dataset = [TokenizedGroup(str(i), group, 0) for i, group in enumerate(groups)]
    sampler = GroupBatchSampler(groups, tokens_per_batch=8, shuffle=False, rank=1, world_size=2)
    assert list(sampler) == [[]]  # rank 0 takes the one batch there is
    (filler,) = group_loader(dataset, sampler)
    assert not filler["counted"]
    assert filler["input_ids"].tolist() == [1, 2]  # the smallest group

    (batch,) = group_loader(dataset, GroupBatchSampler(groups, groups_per_batch=2, shuffle=False))
    assert batch["counted"]
    assert batch["tree"].input_ids.tolist() == pack_groups(groups).input_ids.tolist()
    assert batch["input_ids"] is batch["tree"].input_ids
    assert batch["padded_tokens"] == 3 * 5  # three candidates, the longest of 3 + 2 tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of"),
        ({"groups_per_batch": 2, "tokens_per_batch": 9}, "give one of"),
        ({"groups_per_batch": 0}, "groups_per_batch = 0"),
        ({"tokens_per_batch": 2}, "tokens_per_batch = 2 is too small: group 1 alone takes 6"),
        ({"groups_per_batch": 1, "rank": 2, "world_size": 2}, "rank = 2"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, int], message: str) -> None:
    groups = [Group([1], [[2]]), Group([1, 2, 3], [[4, 5, 6]])]
    with pytest.raises(ValueError, match=message):
        GroupBatchSampler(groups, **arguments)


def test_large_groups_stand_alone_where_asked() -> None:
    groups = [Group([1], [[2]]), Group([1, 2, 3], [[4, 5, 6]]), Group([1], [[3]])]
    sampler = GroupBatchSampler(groups, tokens_per_batch=5, shuffle=False, lone_groups=True)
    assert list(sampler) == [[1], [0, 2]]


def test_no_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match="groups is empty"):
        GroupBatchSampler([], groups_per_batch=1)
