"""Which blocks of a packed tree's attention contain work, from a few bounds per block, without synchronizing.

Query blocks are BLOCK_M queries in the order of their packed rows, key blocks BLOCK_N packed rows. The rows that see
row j are [j, subtree_end[j]); the ranges of a block's consecutive rows overlap, so

    some row of key block [a, b) is seen exactly by the rows in [a, max subtree_end)        (live)
    every row of it is seen exactly by the rows in [b - 1, min subtree_end)                 (full)

Two ranges of queries per key block decide every pair of blocks. A window is decided by the smallest and largest depth
of both blocks: it may keep a block without work, never the reverse. Full blocks need no mask.

This takes a few small tensor operations on the tree's own device; at most `ceil(Tq/M) * ceil(T/N)` entries of 8 bytes
are held (8 MiB for 65536 rows and blocks of 64). The result is cached with the tree's arrays, so all layers, the
backward and a checkpoint's recomputation share it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KEPT = 8
"""Number of trees whose maps are cached."""

_FAR = 2**30
"""Greater than any depth."""


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each of n blocks, the blocks of the other side to visit, in the order of the kernels.

    Attributes:
        index: [n, m] int32, contiguous: the `full` blocks ascending, then the masked ones, then the dead ones.
        full: [n] int32, number of fully visible blocks.
        live: [n] int32, number of blocks to visit.
    """

    index: Tensor
    full: Tensor
    live: Tensor


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The arrays of a tree as kernels use them, and its maps by block size.

    Attributes:
        end: [T] int32 `subtree_end`.
        rows: [Tq] int32 packed row of each query, ascending; None: query i is row i.
        order: [Tq] int32, index of query i of `rows` among the caller's queries; None if `rows` is None.
        depth: [T] int32, None without a window.
        window: in depth, or None.
        kept: cache of what backends derive from the tree.
    """

    end: Tensor
    rows: Tensor | None
    order: Tensor | None
    depth: Tensor | None
    window: int | None
    _lists: dict[tuple[int, int, bool], BlockLists] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def queries(self) -> int:
        return len(self.end if self.rows is None else self.rows)

    def pairs(self, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
        """Which pairs are live, and which of them full; each bool [query blocks, key blocks]."""
        total, device = len(self.end), self.end.device
        rows = torch.arange(total, device=device, dtype=torch.int32) if self.rows is None else self.rows
        ends = _blocks(self.end, block_n, 0)  # a ragged last block has least end 0: never full
        first = torch.arange(len(ends), device=device, dtype=torch.int32) * block_n
        corners = torch.stack([first, ends.amax(1), first + block_n - 1, ends.amin(1)])
        seen_from, seen_to, all_from, all_to = torch.searchsorted(rows, corners)
        start = torch.arange(-(-len(rows) // block_m), device=device)[:, None] * block_m
        stop = start + block_m  # beyond Tq in a ragged last block: never full
        live = (seen_from < stop) & (seen_to > start) & (seen_from < seen_to)
        full = (all_from <= start) & (all_to >= stop)
        if self.depth is not None and self.window is not None:
            of_query = self.depth if self.rows is None else self.depth[self.rows.long()]
            nearest = _least(of_query, block_m)[:, None] - _greatest(self.depth, block_n)
            farthest = _greatest(of_query, block_m)[:, None] - _least(self.depth, block_n)
            live &= (nearest < self.window) & (farthest >= 0)
            full &= (farthest < self.window) & (nearest >= 0)
        return live, full & live

    def lists(self, block_m: int, block_n: int, *, of_keys: bool = False) -> BlockLists:
        """Key blocks for each query block or, `of_keys`, query blocks for each key block."""
        key = (block_m, block_n, of_keys)
        if key not in self._lists:
            live, full = (x.T.contiguous() if of_keys else x for x in self.pairs(block_m, block_n))
            index = torch.argsort(2 - live.int() - full.int(), dim=1, stable=True).int()
            self._lists[key] = BlockLists(index, full.sum(1, dtype=torch.int32), live.sum(1, dtype=torch.int32))
        return self._lists[key]


def _blocks(x: Tensor, size: int, fill: int) -> Tensor:
    return F.pad(x, (0, -len(x) % size), value=fill).view(-1, size)


def _least(x: Tensor, size: int) -> Tensor:
    return _blocks(x, size, _FAR).amin(1)


def _greatest(x: Tensor, size: int) -> Tensor:
    return _blocks(x, size, -_FAR).amax(1)


_Stamp = tuple[tuple[int, int] | None, ...]
_kept: OrderedDict[tuple[_Stamp, int | None], tuple[BlockMap, list[weakref.ref[Tensor]]]] = OrderedDict()


def block_map(
    subtree_end: Tensor, query_rows: Tensor | None, position_ids: Tensor | None, window: int | None
) -> BlockMap:
    """The map of a tree, cached for the same, unchanged tensors."""
    given = (subtree_end, query_rows, None if window is None else position_ids)
    if any(x is not None and x.is_inference() for x in given):  # inference tensors have no version counter
        return _build(*given, window)
    stamp: _Stamp = tuple(None if x is None else (id(x), x._version) for x in given)
    found = _kept.get((stamp, window))
    if found is None or any(ref() is None for ref in found[1]):  # the id of a freed tensor may be reused
        alive = [weakref.ref(x) for x in given if x is not None]
        found = _kept[(stamp, window)] = (_build(*given, window), alive)
    _kept.move_to_end((stamp, window))
    while len(_kept) > KEPT:
        _kept.popitem(last=False)
    return found[0]


def _build(subtree_end: Tensor, query_rows: Tensor | None, depth: Tensor | None, window: int | None) -> BlockMap:
    rows = order = None
    if query_rows is not None:
        rows, order = torch.sort(query_rows, stable=True)
        rows, order = rows.int(), order.int()
    return BlockMap(subtree_end.int(), rows, order, None if depth is None else depth.int(), window)
