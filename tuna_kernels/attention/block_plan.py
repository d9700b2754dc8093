"""How the `torch` backend splits the attention of a packed tree into blocks.

Rows are split where a branch starts (the row before it ends its own subtree) and into blocks of at most
`MAX_ROWS`. The keys that some row of block [a, b) can see are the rows j < b with subtree_end[j] > a: the
ancestors' path and the block itself, a few contiguous runs. So a group with a prompt of P and k responses of
R tokens costs about P² + kR(P + R) scores instead of (P + kR)², and no block crosses groups.

The plan depends on integers alone. It is built on the host and cached by the *content* of its arrays, so that
all layers, the backward and the recomputation of a checkpointed layer share it, and a changed array never
gets an old plan. Blocks never cross a group, and the blocks of a group do not depend on what else is packed:
its attention has the same bits alone and batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

IntArray = npt.NDArray[np.int64]

MAX_ROWS = 64
"""Rows of a block. A long response is a triangle: shorter blocks waste less above its diagonal, longer ones have
fewer launches. Of 48, 64, 96 and 128 rows, 64 was fastest or within 4 % on CPU trees of 324 to 4085 rows."""

BLOCK_COST = 2048
"""Overhead of a block (some 60 small launches forward and backward), in scores: small neighbours are merged."""


@dataclass(frozen=True)
class Block:
    """Consecutive queries and the keys they need.

    Attributes:
        start, stop: the block's range among the queries in row order.
        keys: runs [start, stop) of packed rows, ascending; nk keys in total.
        open: keys before this one, the shared ancestors, are seen by every query of the block.
        hidden: bool [stop - start, nk - open], True where the query must not see the key; None if all see all.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    open: int
    hidden: Tensor | None


@dataclass(frozen=True)
class BlockPlan:
    """Blocks that cover all queries, and the order that sorts the queries by row (None if they are sorted)."""

    blocks: tuple[Block, ...]
    order: Tensor | None


def plan_for(
    subtree_end: Tensor,
    query_rows: Tensor | None,
    position_ids: Tensor | None,
    window: int | None,
    device: torch.device,
) -> BlockPlan:
    """The plan of a tree, from the cache if its arrays are known.

    Args:
        subtree_end: [T] int64.
        query_rows: [Tq] int64 packed row of each query, in any order; None: all rows.
        position_ids: [T] int64 depth of each row; needed with `window`.
        window: only keys with `0 <= depth_i - depth_j < window` are seen; None: no limit.
        device: device of the masks.

    Raises:
        ValueError: `subtree_end[j]` outside `(j, T]`.
        IndexError: a query row outside `[0, T)`.
    """
    return _build(
        host_bytes(subtree_end),
        None if query_rows is None else host_bytes(query_rows),
        None if position_ids is None or window is None else host_bytes(position_ids),
        window,
        device,
    )


_host_copies: Any = WeakTensorKeyDictionary()


def host_bytes(values: Tensor) -> bytes:
    """The content of an int64 tensor; on another device than the CPU it is copied once per tensor and version."""
    if values.device.type == "cpu":
        return values.contiguous().numpy().tobytes()
    version = -1 if values.is_inference() else values._version
    known = _host_copies.get(values)
    if known is not None and known[0] == version != -1:
        return bytes(known[1])
    copied = values.cpu().contiguous().numpy().tobytes()
    _host_copies[values] = (version, copied)
    return copied


@lru_cache(maxsize=8)
def _build(
    end_bytes: bytes,
    rows_bytes: bytes | None,
    depth_bytes: bytes | None,
    window: int | None,
    device: torch.device,
) -> BlockPlan:
    end = np.frombuffer(end_bytes, dtype=np.int64)
    depth = None if depth_bytes is None else np.frombuffer(depth_bytes, dtype=np.int64)
    check_subtree_end(end)
    order = None
    if rows_bytes is None:
        rows = np.arange(len(end))
    else:
        rows = np.frombuffer(rows_bytes, dtype=np.int64)
        check_rows(rows, len(end))
        if np.any(np.diff(rows) < 0):
            by_row = np.argsort(rows, kind="stable")
            rows, order = rows[by_row], torch.from_numpy(by_row).to(device)
    visible = _Visible(end, depth, window)
    blocks = tuple(visible.block(rows, *cut, device) for cut in _cut(rows, end, visible))
    return BlockPlan(blocks, order)


def check_subtree_end(end: IntArray) -> None:
    """Raise `ValueError` unless `j < subtree_end[j] <= T` for all j: every row sees itself."""
    wrong = np.flatnonzero((end <= np.arange(len(end))) | (end > len(end)))
    if wrong.size:
        j = int(wrong[0])
        raise ValueError(f"subtree_end[{j}] = {int(end[j])} is outside ({j}, {len(end)}]")


def check_values(subtree_end: Tensor, query_rows: Tensor | None) -> None:
    """Both checks, if the values can be read without synchronizing."""
    if torch.compiler.is_compiling() or isinstance(subtree_end, FakeTensor) or subtree_end.device.type != "cpu":
        return
    check_subtree_end(np.array(subtree_end.tolist(), dtype=np.int64))  # inside torch.func tensors have no numpy()
    if query_rows is not None:
        check_rows(np.array(query_rows.tolist(), dtype=np.int64), len(subtree_end))


def check_rows(rows: IntArray, total: int) -> None:
    """Raise `IndexError` unless all query rows lie in [0, T)."""
    wrong = np.flatnonzero((rows < 0) | (rows >= total))
    if wrong.size:
        i = int(wrong[0])
        raise IndexError(f"query_rows[{i}] = {int(rows[i])} is outside [0, {total})")


@dataclass(frozen=True)
class _Visible:
    """Which keys the rows of a block see."""

    end: IntArray
    depth: IntArray | None
    window: int | None

    def keys(self, first: int, last: int, root: int) -> IntArray:
        """Rows of [root, last] that some row of [first, last] can see (a superset)."""
        keys = np.arange(root, last + 1)
        seen = self.end[root : last + 1] > first
        if self.depth is not None and self.window is not None:
            seen &= self.depth[root : last + 1] > self.depth[first : last + 1].min() - self.window
        return keys[seen]

    def cost(self, rows: IntArray, start: int, stop: int, root: int) -> int:
        """Score elements of the block of the queries [start, stop), including its overhead."""
        return BLOCK_COST + (stop - start) * len(self.keys(int(rows[start]), int(rows[stop - 1]), root))

    def block(self, rows: IntArray, start: int, stop: int, root: int, device: torch.device) -> Block:
        """The block of the queries [start, stop), whose group begins at row `root`."""
        i = rows[start:stop, None]
        keys = self.keys(int(rows[start]), int(rows[stop - 1]), root)
        hidden = (keys[None, :] > i) | (self.end[keys][None, :] <= i)
        if self.depth is not None and self.window is not None:
            distance = self.depth[i] - self.depth[keys][None, :]
            hidden |= (distance < 0) | (distance >= self.window)
        needed = ~hidden.all(axis=0)  # there may be few query rows, and a window may leave gaps
        keys, hidden = keys[needed], hidden[:, needed]
        cuts = np.flatnonzero(np.diff(keys) != 1) + 1
        runs = tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(keys, cuts))
        partly = np.flatnonzero(hidden.any(axis=0))
        if not partly.size:
            return Block(start, stop, runs, len(keys), None)
        first = int(partly[0])
        mask = torch.from_numpy(np.ascontiguousarray(hidden[:, first:])).to(device)
        return Block(start, stop, runs, first, mask)


def _cut(rows: IntArray, end: IntArray, visible: _Visible) -> list[tuple[int, int, int]]:
    """(start, stop, root) of the blocks in order: a range of queries and the first row of their group."""
    if not len(rows):
        return []
    index = np.arange(1, len(end))
    branches = np.flatnonzero(end[:-1] <= index) + 1  # the row before is a leaf: a branch or group starts here
    roots = np.append(0, np.flatnonzero(np.maximum.accumulate(end)[:-1] <= index) + 1)
    cuts = np.unique(np.concatenate([[0], np.searchsorted(rows, branches), [len(rows)]]))
    merged: list[tuple[int, int, int]] = []
    last_cost = 0
    for start, stop in _pieces(cuts):
        root = int(roots[np.searchsorted(roots, rows[start], side="right") - 1])
        cost = visible.cost(rows, start, stop, root)
        if merged and merged[-1][2] == root and stop - merged[-1][0] <= MAX_ROWS:
            together = visible.cost(rows, merged[-1][0], stop, root)
            if together <= last_cost + cost:
                merged[-1], last_cost = (merged[-1][0], stop, root), together
                continue
        merged.append((start, stop, root))
        last_cost = cost
    return merged


def _pieces(cuts: IntArray) -> list[tuple[int, int]]:
    """The ranges between cuts, long ones split evenly into at most `MAX_ROWS`."""
    pieces: list[tuple[int, int]] = []
    for start, stop in pairwise(cuts.tolist()):
        parts = -(-(stop - start) // MAX_ROWS)
        bounds = [start + (stop - start) * part // parts for part in range(parts + 1)]
        pieces.extend(pairwise(bounds))
    return pieces
