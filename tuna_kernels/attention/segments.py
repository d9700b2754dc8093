"""A packed tree as a few batches of plain sequences, for kernels that support only sequences.

Rows are split into *segments* without a fork: consecutive rows with the same `subtree_end`. A row sees

    its own segment up to itself            one causal batch: all segments
    every segment above its own, whole      one unmasked batch per level: queries are all rows below a segment

The rows below a segment [s, e) with end E are [e, E), one contiguous range; the ranges of one level do not overlap. A
prompt with k responses has one level. Index arithmetic only, on the host, cached by content.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuna_kernels.attention.block_plan import IntArray, check_subtree_end

Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Part:
    """One batch of sequences.

    Attributes:
        causal: query n of a sequence sees its keys up to n; else all of them.
        queries, keys: [n] int64 packed rows, sequence after sequence; None: all rows in order.
        query_offsets, key_offsets: [sequences + 1] int32.
        longest_query, longest_key: rows of the longest sequence.
    """

    causal: bool
    queries: Tensor | None
    keys: Tensor | None
    query_offsets: Tensor
    key_offsets: Tensor
    longest_query: int
    longest_key: int


@lru_cache(maxsize=8)
def parts_of(end_bytes: bytes, device: torch.device) -> tuple[Part, ...]:
    """The parts of a tree, the causal one first. `end_bytes` is the content of the int64 `subtree_end`.

    Raises:
        ValueError: `subtree_end[j]` outside `(j, T]`.
    """
    end = np.frombuffer(end_bytes, dtype=np.int64)
    check_subtree_end(end)
    if not len(end):
        return ()
    starts = np.flatnonzero(np.diff(end, prepend=end[0] - 1))
    segments = [(int(s), int(e)) for s, e in pairwise([*starts, len(end)])]
    own_offsets, own_longest = _offsets(segments)
    offsets = torch.from_numpy(own_offsets).to(device)
    own = Part(True, None, None, offsets, offsets, own_longest, own_longest)
    levels: list[tuple[list[Range], list[Range]]] = []
    for start, stop in segments:
        below = (stop, int(end[start]))
        if below[0] == below[1]:
            continue
        level = next((pair for pair in levels if pair[0][-1][1] <= stop), None)
        if level is None:
            level = ([], [])
            levels.append(level)
        level[0].append(below)
        level[1].append((start, stop))
    return (own, *(_unmasked(queries, keys, device) for queries, keys in levels))


def _unmasked(queries: list[Range], keys: list[Range], device: torch.device) -> Part:
    (query_offsets, longest_query), (key_offsets, longest_key) = _offsets(queries), _offsets(keys)
    host = (_rows(queries), _rows(keys), query_offsets, key_offsets)
    query_rows, key_rows, query_ends, key_ends = (torch.from_numpy(x).to(device) for x in host)
    return Part(False, query_rows, key_rows, query_ends, key_ends, longest_query, longest_key)


def _offsets(ranges: list[Range]) -> tuple[npt.NDArray[np.int32], int]:
    lengths = [stop - start for start, stop in ranges]
    return np.array([0, *accumulate(lengths)], dtype=np.int32), max(lengths)


def _rows(ranges: list[Range]) -> IntArray:
    return np.concatenate([np.arange(start, stop) for start, stop in ranges])
