"""The passes of the two-phase schedule, cut from a packed tree. Integers on the host; no model.

A group's rows are cut before the *last* prompt token: the rows before it are shared by all passes, and every pass
recomputes the last prompt token, followed by its own responses::

    tree     a b c | d e f     three prompt tokens, responses d e and f
    prompt   a b               its keys and values are shared
    pass 1       c   d e       rows of c and d predict d and e
    pass 2       c   f         the row of c predicts f

So the row that predicts a response's first token is in the pass of that response, and the prompt has no slots.
This costs one row per pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tuna_kernels.tree import Group, PackedTree, pack_groups

__all__ = ["Layout", "TreeGroups", "dummy_layout", "prompt_layout"]


@dataclass(frozen=True, eq=False)
class Layout:
    """One pass over the last Tq of a tree's T rows.

    Attributes:
        input_ids: [Tq] tokens of the rows computed.
        position_ids: [T] depth of all rows.
        subtree_end: [T] as in `PackedTree`.
        query_rows: [Tq] the rows computed: T - Tq, …, T - 1; None: all.
        rows: [m] which of the Tq rows predicts each slot.
        targets: [m] the slots' tokens.
        slots: [m] indices of the slots in the whole tree.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    query_rows: Tensor | None
    rows: Tensor
    targets: Tensor
    slots: Tensor

    def to(self, device: torch.device) -> Layout:
        """A copy on `device`."""
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


class TreeGroups:
    """The groups of a packed tree as tokens, whatever the tree shares."""

    def __init__(self, tree: PackedTree) -> None:
        self._tree = tree
        self._offsets, self._groups = tree.candidate_offsets_host, tree.group_offsets_host
        self._ids, self._targets = tree.input_ids.cpu(), tree.targets.cpu()
        first = torch.from_numpy(self._offsets[self._groups[:-1]])  # the first slot of each group
        depth = tree.position_ids.cpu()[tree.rows.cpu()[first]]  # of the last prompt token, which predicts it
        starts = torch.from_numpy(tree.group_rows_host[:-1])
        self.prompt_rows: list[tuple[int, int]] = [
            (start, start + length) for start, length in zip(starts.tolist(), (depth + 1).tolist(), strict=True)
        ]
        """Packed rows `start:stop` of each group's prompt."""

    def __len__(self) -> int:
        return len(self.prompt_rows)

    def candidates(self, group: int) -> range:
        """Indices of the group's candidates in the tree."""
        return range(int(self._groups[group]), int(self._groups[group + 1]))

    def prompt(self, group: int) -> Tensor:
        """Tokens of the group's prompt."""
        return self._ids[slice(*self.prompt_rows[group])]

    def response(self, candidate: int) -> Tensor:
        """Tokens of the candidate's response."""
        return self._targets[slice(*self._offsets[candidate : candidate + 2].tolist())]

    def whole(self) -> Layout:
        """The pass of the whole tree, as packed."""
        tree = self._tree
        slots = torch.arange(tree.num_slots)
        return Layout(tree.input_ids, tree.position_ids, tree.subtree_end, None, tree.rows, tree.targets, slots)

    def largest_pass(self, candidates_per_pass: int) -> int:
        """Upper bound on the rows of a pass over `candidates_per_pass` candidates of a group, or over a prompt."""
        largest = 0
        for g in range(len(self)):
            longest = sorted(map(self._length, self.candidates(g)))[-candidates_per_pass:]
            largest = max(largest, 1 + sum(longest), len(self.prompt(g)) - 1)
        return largest

    def chunks(self, group: int, most_rows: int) -> list[list[int]]:
        """The group's candidates in order, as many together as have `most_rows` rows, and one at least."""
        found: list[list[int]] = []
        rows = most_rows
        for c in self.candidates(group):
            if rows + self._length(c) > most_rows:
                found.append([])
                rows = 1
            found[-1].append(c)
            rows += self._length(c)
        return found

    def _length(self, candidate: int) -> int:
        return int(self._offsets[candidate + 1] - self._offsets[candidate])

    def branches(self, group: int, candidates: Sequence[int]) -> Layout:
        """The pass of some candidates of a group; their common prefixes are shared."""
        prompt = self.prompt(group)
        tree = pack_groups([Group(prompt, [self.response(c) for c in candidates])])
        slots = [torch.arange(*self._offsets[c : c + 2].tolist()) for c in candidates]
        return _cut(tree, len(prompt) - 1, torch.cat(slots))


def prompt_layout(prompt: Tensor) -> Layout:
    """The pass of the shared prompt rows. Its single slot is not in the tree and has weight 0."""
    return _cut(pack_groups([Group(prompt[:-1], [prompt[-1:]])]), 0, torch.empty(0, dtype=torch.int64), stop=-1)


def dummy_layout(prompt: Tensor, response: Tensor) -> Layout:
    """The smallest possible pass: one row, one slot with weight 0."""
    return prompt_layout(torch.cat([prompt[-1:], response[:1]]))


def _cut(tree: PackedTree, shared: int, slots: Tensor, stop: int | None = None) -> Layout:
    """The rows of a tree from `shared` to `stop`."""
    total = len(tree.input_ids[:stop])
    return Layout(
        input_ids=tree.input_ids[shared:stop],
        position_ids=tree.position_ids[:stop],
        subtree_end=tree.subtree_end[:stop].clamp(max=total),
        query_rows=torch.arange(shared, total),
        rows=tree.rows - shared,
        targets=tree.targets,
        slots=slots,
    )
