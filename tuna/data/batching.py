"""Batches of groups: which groups are in which micro-batch of which rank, and how a batch is packed.

All ranks derive the same plan of an epoch from the seed: micro-batch m of rank r is entry `m * world_size + r` of the
plan. So every rank has the same number of micro-batches, no communication is needed, and an epoch is resumed by
skipping its first n batches. The rules:

- Every group is in exactly one micro-batch of an epoch; none is repeated and none is dropped.
- By groups: `groups_per_batch` groups in shuffled order; the groups left over at the end of an epoch are
  spread evenly over the ranks.
- By tokens: micro-batches of at most `tokens_per_batch` tree tokens, planned once over windows of shuffled
  groups; each epoch shuffles the micro-batches. (A new plan per epoch would change their number, which
  transformers' `Trainer` assumes to be fixed.)
- Ranks wait for each other in every round (one micro-batch per rank), so a round's micro-batches should be of similar
  size. By groups: the groups of a round are distributed to balance tokens over ranks; which groups a round has does
  not change. By tokens: `ALIKE` micro-batches of similar size follow each other. Beyond that, neither depends on the
  number of ranks: a run resumed with twice the ranks and half the accumulation has the same groups in every step.
- Where the last round has fewer micro-batches than ranks, the other ranks get an empty one. The collator
  puts the smallest group there, marked `counted = False`: it keeps collectives in step, and its loss is
  multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler
from typing_extensions import NotRequired  # in typing from Python 3.11 on

from tuna.data.tokenization import TokenizedGroup
from tuna_kernels import Group, PackedTree, pack_groups, plan_rows, tree_tokens
from tuna_kernels.tree import Share

WINDOW = 512
"""Groups that a token plan packs together: enough to fill rows, few enough to keep long groups apart."""


ALIKE = 8
"""Micro-batches of similar size that stay together when an epoch is shuffled: balances up to this many ranks."""
BLOCK = 64
"""Micro-batches that are sorted by size at a time: few, so that the neighbours of a batch differ between epochs."""


class Batch(TypedDict):
    """One micro-batch.

    `input_ids` is the tree's own tensor, from which transformers' `Trainer` counts tokens and FLOPs; `padded_tokens`
    is the size of the same groups as k padded copies; `counted` is False for a batch that only keeps ranks in
    step; `ids` are those of its records; `two_phase` is the trainer's choice for this batch.
    """

    input_ids: torch.Tensor
    tree: PackedTree
    padded_tokens: int
    counted: bool
    ids: list[str]
    two_phase: NotRequired[bool]


class GroupBatchSampler(Sampler[list[int]]):
    """Group indices of each micro-batch of one rank; the module docstring has the rules.

    Args:
        groups: all groups of the dataset, the same on every rank.
        groups_per_batch: groups per micro-batch and rank; give exactly one of this and `tokens_per_batch`.
        tokens_per_batch: upper limit of tree tokens (under `share`) per micro-batch and rank.
        shuffle: shuffle by `seed` and epoch; otherwise in the order given (by groups) or planned (by tokens).
        share: as in `tuna_kernels.pack_groups`; decides how many tokens a group has.
        lone_groups: put a group of more than `tokens_per_batch` tokens into a separate micro-batch instead of
            raising an error.

    Raises:
        ValueError: no groups, both or neither of the batch sizes, one below 1, a rank outside the world, or a
            group of more than `tokens_per_batch` tokens.

    Examples:
        >>> groups = [Group([1], [[2]])] * 5
        >>> list(GroupBatchSampler(groups, groups_per_batch=2, shuffle=False))
        [[0, 1], [2, 3], [4]]
        >>> two_ranks = [
        ...     GroupBatchSampler(groups, groups_per_batch=2, shuffle=False, rank=rank, world_size=2)
        ...     for rank in (0, 1)
        ... ]
        >>> [list(sampler) for sampler in two_ranks]
        [[[0, 1], [4]], [[2, 3], []]]
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        groups_per_batch: int | None = None,
        tokens_per_batch: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        share: Share = "tree",
        lone_groups: bool = False,
    ) -> None:
        if (groups_per_batch is None) == (tokens_per_batch is None):
            raise ValueError(
                f"give one of groups_per_batch = {groups_per_batch} and tokens_per_batch = {tokens_per_batch}"
            )
        for name, size in (("groups_per_batch", groups_per_batch), ("tokens_per_batch", tokens_per_batch)):
            if size is not None and size < 1:
                raise ValueError(f"{name} = {size} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} is outside the world of {world_size}")
        if len(groups) == 0:
            raise ValueError("groups is empty: there is nothing to batch")
        self.num_groups, self.groups_per_batch = len(groups), groups_per_batch
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.rank, self.world_size = rank, world_size
        self._tokens = tree_tokens(groups, share=share)
        self._token_rows: list[list[int]] = []
        if tokens_per_batch is not None:
            self._token_rows = self._plan_tokens(groups, tokens_per_batch, share, lone_groups)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches per rank and epoch: the same on every rank and in every epoch."""
        if self.groups_per_batch is None:
            return -(-len(self._token_rows) // self.world_size)
        return -(-self.num_groups // (self.groups_per_batch * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.plan()[self.rank :: self.world_size]

    def plan(self) -> list[list[int]]:
        """The epoch's micro-batches, ranks interleaved; their number is a multiple of the world size."""
        rows = self._group_rows() if self.groups_per_batch is not None else self._shuffled_token_rows()
        return rows + [[] for _ in range(-len(rows) % self.world_size)]

    def _group_rows(self) -> list[list[int]]:
        assert self.groups_per_batch is not None
        order = np.arange(self.num_groups)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_groups)
        step = self.groups_per_batch * self.world_size
        whole = self.num_groups - self.num_groups % step
        rows = order[:whole].reshape(-1, self.groups_per_batch).tolist()
        if self.shuffle and self.groups_per_batch > 1 < self.world_size:
            rows = [row for part in order[:whole].reshape(-1, step) for row in self._dealt(part)]
        if whole < self.num_groups:
            rows += [part.tolist() for part in np.array_split(order[whole:], self.world_size)]
        return rows

    def _dealt(self, groups: npt.NDArray[np.int64]) -> list[list[int]]:
        """Distribute the groups of a round, longest first, each to the rank with room and the fewest tokens."""
        rows: list[list[int]] = [[] for _ in range(self.world_size)]
        tokens = [0] * self.world_size
        for group in groups[np.argsort(-self._tokens[groups], kind="stable")].tolist():
            rank = min(
                (r for r, row in enumerate(rows) if len(row) < len(groups) // self.world_size), key=lambda r: tokens[r]
            )
            rows[rank].append(group)
            tokens[rank] += int(self._tokens[group])
        return rows

    def _shuffled_token_rows(self) -> list[list[int]]:
        if not self.shuffle:
            return list(self._token_rows)
        rng = np.random.default_rng([self.seed, self.epoch, 1])
        order = rng.permutation(len(self._token_rows))
        size = np.array([self._tokens[row].sum() for row in self._token_rows])
        whole = len(order) - len(order) % ALIKE
        blocks = [order[start : min(start + BLOCK, whole)] for start in range(0, whole, BLOCK)]
        alike = np.concatenate([np.empty(0, np.int64), *(block[np.argsort(size[block])] for block in blocks)])
        chunks = rng.permutation(alike.reshape(-1, ALIKE)).ravel()  # permutes chunks, not what is in them
        return [self._token_rows[row] for row in [*chunks, *order[whole:]]]

    def _plan_tokens(
        self, groups: Sequence[Group], tokens_per_batch: int, share: Share, lone_groups: bool
    ) -> list[list[int]]:
        tokens = self._tokens
        large = np.flatnonzero(tokens > tokens_per_batch)
        if large.size and not lone_groups:
            raise ValueError(
                f"tokens_per_batch = {tokens_per_batch} is too small: group {large[0]} alone takes "
                f"{tokens[large[0]]} tree tokens"
            )
        order = np.arange(self.num_groups)
        if self.shuffle:
            order = np.random.default_rng(self.seed).permutation(self.num_groups)
        order = order[tokens[order] <= tokens_per_batch]
        rows = [[group] for group in large.tolist()]
        for start in range(0, len(order), WINDOW):
            window = order[start : start + WINDOW]
            planned = plan_rows([groups[i] for i in window], tokens_per_batch, share=share)
            rows += [window[row].tolist() for row in planned]
        return rows


class GroupCollator:
    """Packs the tokenised groups of a micro-batch; an empty micro-batch gets `filler` with `counted = False`."""

    def __init__(self, filler: Group, *, share: Share = "tree") -> None:
        self.filler, self.share = filler, share

    def __call__(self, items: Sequence[TokenizedGroup]) -> Batch:
        groups = [item.group for item in items] or [self.filler]
        tree = pack_groups(groups, share=self.share)
        longest = max(len(group.prompt) + len(response) for group in groups for response in group.responses)
        return Batch(
            input_ids=tree.input_ids,
            tree=tree,
            padded_tokens=tree.num_candidates * longest,
            counted=len(items) > 0,
            ids=[item.id for item in items],
        )


class GroupLoader(DataLoader[TokenizedGroup]):
    """A `DataLoader` over `GroupBatchSampler` with the `set_epoch` that transformers' `Trainer` calls.

    A thread packs the next batch while the current one is computed.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # the base class promises its own iterator
        batches = super().__iter__()
        with ThreadPoolExecutor(1, thread_name_prefix="packing") as thread:
            ahead = thread.submit(next, batches, None)
            while (batch := ahead.result()) is not None:
                ahead = thread.submit(next, batches, None)
                yield batch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the batch sampler."""
        assert isinstance(self.batch_sampler, GroupBatchSampler)
        self.batch_sampler.set_epoch(epoch)


def group_loader(
    dataset: Sequence[TokenizedGroup],
    sampler: GroupBatchSampler,
    *,
    share: Share = "tree",
    num_workers: int = 0,
) -> GroupLoader:
    """A loader of `dataset` in the batches of `sampler`, packed on the host."""
    groups = [item.group for item in dataset]
    filler = groups[int(tree_tokens(groups, share=share).argmin())]
    return GroupLoader(
        dataset,  # type: ignore[arg-type]  # a sequence is a map-style dataset
        batch_sampler=sampler,
        collate_fn=GroupCollator(filler, share=share),
        num_workers=num_workers,
    )
