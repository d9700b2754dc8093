"""The packed prefix tree: the only data layout of `tuna_kernels`.

A group is a prompt and its k candidates. Groups are packed without padding into one sequence of T tokens, each in
depth-first order of its prefix tree, and one array defines the attention:

    row i attends to row j exactly when  j <= i < subtree_end[j]

This comparison covers the causal mask, the boundary between groups, the shared prompt and any deeper sharing.
The response tokens that count, the slots, are listed separately in candidate order: `rows[m]` is the row
whose hidden state predicts `targets[m]`. A row may have slots of several candidates.

Order of the rows: groups as given. Within a group, `share="tree"` is depth-first with the branches of every
node in increasing order of their token, so the rows do not depend on the order of the candidates;
`share="prompt"` and `"none"` keep the order of the candidates.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from tuna_kernels.groups import FlatGroups, Group, IntArray, dense_ranks, flatten_groups, offsets
from tuna_kernels.loss_counts import LossCounts

__all__ = ["Group", "PackedTree", "Share", "pack_groups", "plan_rows", "tree_tokens"]

Share: TypeAlias = Literal["tree", "prompt", "none"]


@dataclass(frozen=True, eq=False)
class PackedTree:
    """G groups with C candidates packed into one sequence of T tokens, and the M slots to be scored.

    Tensors are int64 (`scores_given` float64) on one device; the `_host` copies are numpy and stay on the
    host, so that shapes and loop bounds need no synchronization.

    Attributes:
        input_ids: [T] token ids, each distinct prefix of a group once (with `share="tree"`).
        position_ids: [T] depth in the tree, which is the position in the candidate's own sequence.
        subtree_end: [T] one past the last row of the row's subtree.
        rows: [M] packed row whose hidden state predicts the slot's token.
        targets: [M] the slot's token.
        candidate_offsets: [C + 1] slots of candidate c: `candidate_offsets[c]:candidate_offsets[c + 1]`.
        group_offsets: [G + 1] candidates of group g: `group_offsets[g]:group_offsets[g + 1]`.
        ranks: [C] dense within a group, 0 is best, equal is a tie.
        scores_given: [C] float64, as given; NaN for groups without scores.
        candidate_offsets_host: numpy int64 [C + 1].
        group_offsets_host: numpy int64 [G + 1].
        group_rows_host: numpy int64 [G + 1], the first packed row of each group, then T.
        ranks_host: numpy int64 [C].
        unshared_tokens: tokens of the C full sequences, the sum of |prompt| + |response|.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    subtree_end: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    candidate_offsets: torch.Tensor
    group_offsets: torch.Tensor
    ranks: torch.Tensor
    scores_given: torch.Tensor
    candidate_offsets_host: IntArray
    group_offsets_host: IntArray
    group_rows_host: IntArray
    ranks_host: IntArray
    unshared_tokens: int

    @property
    def num_tokens(self) -> int:
        """T, the number of packed rows."""
        return self.input_ids.shape[0]

    @property
    def num_slots(self) -> int:
        """M, the number of response tokens of all candidates."""
        return self.rows.shape[0]

    @property
    def num_candidates(self) -> int:
        """C, the number of candidates of all groups."""
        return len(self.ranks_host)

    @property
    def num_groups(self) -> int:
        """G, the number of groups."""
        return len(self.group_offsets_host) - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedTree:
        """A copy of the tree with its tensors on `device`; host copies are shared."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

    def loss_counts(self) -> LossCounts:
        """Denominators of the losses, counted on the host over this tree alone."""
        return LossCounts.from_ranks(self.ranks_host, self.group_offsets_host, self.num_slots)


def pack_groups(
    groups: Sequence[Group], *, share: Share = "tree", device: torch.device | str | None = None
) -> PackedTree:
    """Pack groups into one sequence.

    Args:
        groups: any number of groups, of any sizes; an empty sequence gives a tree with T = M = 0.
        share: what a group's candidates share: `"tree"` every common prefix, `"prompt"` only the
            prompt, `"none"` nothing (k separate sequences, still unpadded). Scores and gradients are the same
            up to rounding.
        device: device of the tensors (default: the CPU).

    Ranks are made dense within each group, on the host, from the given ranks or float64 scores. Identical
    responses of a group are tied at the best rank among them before ranks are made dense.

    Raises:
        TypeError: something is not a `Group`, or tokens, ranks or scores have the wrong type.
        ValueError: an unknown `share`, an empty prompt, response or list of responses, a negative token,
            the wrong number of scores or ranks, a non-finite score, both scores and ranks. All messages give the
            position.

    Examples:
        >>> tree = pack_groups([Group(prompt=[7, 8], responses=[[1, 2], [1, 3]], scores=[0.2, 0.9])])
        >>> tree.input_ids.tolist(), tree.position_ids.tolist(), tree.subtree_end.tolist()
        ([7, 8, 1, 2, 3], [0, 1, 2, 3, 3], [5, 5, 5, 4, 5])
        >>> tree.rows.tolist(), tree.targets.tolist(), tree.ranks.tolist()
        ([1, 2, 1, 2], [1, 2, 1, 3], [1, 0])
    """
    _check_share(share)
    flat = flatten_groups(groups)
    order, common = _sort_candidates(flat)
    ranks = dense_ranks(flat, order, common)
    if share != "tree":
        order = np.arange(len(order))
    kept = _kept_tokens(flat, common, share)
    lengths = (flat.prompt_lengths[flat.candidate_groups] + flat.response_lengths)[order]
    starts = offsets(lengths - kept)
    input_ids, position_ids, subtree_end, rows = _lay_out(flat, order, kept, starts)

    def tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return PackedTree(
        input_ids=tensor(input_ids),
        position_ids=tensor(position_ids),
        subtree_end=tensor(subtree_end),
        rows=tensor(rows),
        targets=tensor(flat.responses),
        # Copies: from_numpy shares memory, and the host arrays must not change with the tensors.
        candidate_offsets=tensor(flat.response_offsets.copy()),
        group_offsets=tensor(flat.group_offsets.copy()),
        ranks=tensor(ranks.copy()),
        scores_given=tensor(flat.scores),
        candidate_offsets_host=flat.response_offsets,
        group_offsets_host=flat.group_offsets,
        group_rows_host=starts[flat.group_offsets],
        ranks_host=ranks,
        unshared_tokens=int(lengths.sum()),
    )


def tree_tokens(groups: Sequence[Group], *, share: Share = "tree") -> IntArray:
    """Number of packed tokens of each group, int64 [G]; raises as `pack_groups` does.

    Examples:
        >>> group = Group(prompt=[7, 8], responses=[[1, 2], [1, 3]])
        >>> [int(tree_tokens([group], share=share)[0]) for share in ("tree", "prompt", "none")]
        [5, 6, 8]
    """
    _check_share(share)
    flat = flatten_groups(groups)
    common = _sort_candidates(flat)[1] if share == "tree" else np.zeros_like(flat.keys)
    # Sums over a group do not depend on the order within it, so `kept` may stay in sorted order.
    lengths = flat.prompt_lengths[flat.candidate_groups] + flat.response_lengths
    totals = offsets(lengths - _kept_tokens(flat, common, share))
    return np.diff(totals[flat.group_offsets])


def plan_rows(groups: Sequence[Group], max_tokens: int, *, share: Share = "tree") -> list[list[int]]:
    """Split groups into rows of at most `max_tokens` packed tokens each.

    Best-fit decreasing: the largest group first (ties: the earlier one), each into the fullest row with enough
    room (ties: the row opened first), else into a new one. Deterministic; no two rows would fit into one,
    and asymptotically there are at most 11/9 times the minimum number of rows (Johnson 1974).

    Args:
        groups: the groups.
        max_tokens: maximum tokens per row, at least 1.
        share: as in `pack_groups`; it determines the size of a group.

    Returns:
        Group indices of each row, increasing within the row; rows in order of their first group. Every group
        is in exactly one row.

    Raises:
        TypeError: `max_tokens` is not an integer; else as `pack_groups`.
        ValueError: `max_tokens` is below 1, or a single group exceeds it; else as `pack_groups`.

    Examples:
        >>> small, large = Group([7], [[1]]), Group([7, 8, 9], [[1]])
        >>> plan_rows([small, large, small], max_tokens=6)
        [[0, 1], [2]]
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer):
        raise TypeError(f"max_tokens = {max_tokens!r} is not an integer")
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens} must be at least 1")
    tokens = tree_tokens(groups, share=share)
    for g in np.flatnonzero(tokens > max_tokens):
        raise ValueError(f"groups[{g}] takes {tokens[g]} tokens, more than max_tokens = {max_tokens}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), increasing
    for g in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[g])
        fit = bisect_left(room, (size, 0))
        if fit < len(room):
            left, row = room.pop(fit)
        else:
            left, row = int(max_tokens), len(rows)
            rows.append([])
        rows[row].append(g)
        insort(room, (left - size, row))
    return sorted(sorted(row) for row in rows)


def _check_share(share: str) -> None:
    if share not in get_args(Share):
        raise ValueError(f"share = {share!r} is not one of {', '.join(map(repr, get_args(Share)))}")


def _sort_candidates(flat: FlatGroups) -> tuple[IntArray, IntArray]:
    """Candidates of each group in lexicographic order of their responses, and the common prefixes of neighbours.

    Returns:
        order: int64 [C]; groups stay in place, identical responses keep the given order.
        common: int64 [C]; the common prefix length of `order[s]` and `order[s - 1]`, 0 for a group's first.
    """
    # Big-endian bytes of non-negative integers compare like the integers, so memcmp sorts whole responses.
    codes = flat.responses.astype(">i8").tobytes()
    bounds = flat.response_offsets.tolist()
    order = np.arange(len(flat.keys))
    common = np.zeros_like(order)
    for first, last in pairwise(flat.group_offsets.tolist()):
        if last - first == 1:
            continue
        candidates = range(first, last)
        code = {c: codes[8 * bounds[c] : 8 * bounds[c + 1]] for c in candidates}
        order[first:last] = by_response = sorted(candidates, key=code.__getitem__)
        responses = [flat.responses[bounds[c] : bounds[c + 1]] for c in by_response]
        common[first + 1 : last] = [_common_prefix(a, b) for a, b in pairwise(responses)]
    return order, common


def _common_prefix(a: IntArray, b: IntArray) -> int:
    """Length of the common prefix of two non-empty responses."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    first = int(differ.argmax())
    return first if differ[first] else length


def _kept_tokens(flat: FlatGroups, common: IntArray, share: Share) -> IntArray:
    """Length of the prefix that each sequence shares with the sequence laid out before it, int64 [C]."""
    if share == "none":
        return np.zeros_like(common)
    kept = flat.prompt_lengths[flat.candidate_groups]
    if share == "tree":
        kept = kept + common
    kept[flat.group_offsets[:-1]] = 0
    return kept


def _lay_out(
    flat: FlatGroups, order: IntArray, kept: IntArray, starts: IntArray
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Lay out the sequences one by one, each without the `kept` tokens it shares with the previous one.

    Args:
        flat: the groups.
        order: int64 [C], the order in which candidates are laid out, group by group.
        kept: int64 [C], in that order.
        starts: int64 [C + 1], the first new packed row of each, in that order.

    Returns:
        input_ids, position_ids, subtree_end, each int64 [T], and rows, int64 [M].
    """
    total = int(starts[-1])
    input_ids, position_ids, subtree_end = (np.empty(total, np.int64) for _ in range(3))
    rows = np.empty(len(flat.responses), np.int64)
    longest = int(flat.prompt_lengths.max(initial=0) + flat.response_lengths.max(initial=0))
    depths = np.arange(longest)
    path = np.empty(longest, np.int64)  # the packed row of each position of the previous sequence
    depth = 0  # its length
    prompts, responses = flat.prompt_offsets.tolist(), flat.response_offsets.tolist()
    groups = flat.candidate_groups.tolist()
    for c, keep, start in zip(order.tolist(), kept.tolist(), starts[:-1].tolist(), strict=True):
        prompt = flat.prompts[prompts[groups[c]] : prompts[groups[c] + 1]]
        response = flat.responses[responses[c] : responses[c + 1]]
        length = len(prompt) + len(response)
        # The new branch leaves the path at `keep`: all deeper rows have complete subtrees.
        subtree_end[path[keep:depth]] = start
        new = slice(start, start + length - keep)
        input_ids[new] = np.concatenate([prompt, response])[keep:]
        position_ids[new] = depths[keep:length]
        path[keep:length] = depths[keep:length] + (start - keep)
        rows[responses[c] : responses[c + 1]] = path[len(prompt) - 1 : length - 1]
        depth = length
    subtree_end[path[:depth]] = total
    return input_ids, position_ids, subtree_end, rows
