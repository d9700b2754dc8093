"""Brute force for the packed tree: prefixes as tuples, who-sees-whom as a dense table. Slow and obvious."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tuna_kernels.tree import Group

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class OracleTree:
    """What `pack_groups` must give, in plain lists, and the dense table of who attends to whom [T, T]."""

    input_ids: list[int]
    position_ids: list[int]
    subtree_end: list[int]
    rows: list[int]
    targets: list[int]
    candidate_offsets: list[int]
    group_offsets: list[int]
    group_rows: list[int]
    ranks: list[int]
    visible: npt.NDArray[np.bool_]


def plain(tokens: object) -> Prefix:
    """Any accepted kind of token sequence as a tuple of Python integers."""
    return tuple(int(token) for token in tokens)  # type: ignore[attr-defined]


def sequences(group: Group) -> list[Prefix]:
    """The full sequences of a group, prompt and response."""
    return [plain(group.prompt) + plain(response) for response in group.responses]


def rule(subtree_end: torch.Tensor) -> npt.NDArray[np.bool_]:
    """The attention rule as a dense table [T, T]: row i attends to row j when j <= i < subtree_end[j]."""
    i = torch.arange(len(subtree_end))
    return ((i[None, :] <= i[:, None]) & (i[:, None] < subtree_end[None, :])).numpy()


def oracle_tree(groups: list[Group], share: str) -> OracleTree:
    """Lay out `groups` by listing the nodes (owner, prefix) of each group and comparing all pairs of them."""
    nodes: list[tuple[int, int | None, Prefix]] = []  # group, owning candidate (None: shared), prefix
    rows: list[int] = []
    targets: list[int] = []
    group_rows, ranks = [0], []
    for g, group in enumerate(groups):
        prompt = len(plain(group.prompt))
        full = sequences(group)

        def owner(c: int, length: int, prompt: int = prompt) -> int | None:
            return {"tree": None, "prompt": None if length <= prompt else c, "none": c}[share]

        own = [(g, owner(c, n), seq[:n]) for c, seq in enumerate(full) for n in range(1, len(seq) + 1)]
        own = list(dict.fromkeys(own))
        if share == "tree":  # sorted prefixes are the depth-first order with branches in order of their token
            own.sort(key=lambda node: node[2])
        nodes += own
        for c, seq in enumerate(full):
            rows += [nodes.index((g, owner(c, n), seq[:n])) for n in range(prompt, len(seq))]
            targets += seq[prompt:]
        group_rows.append(len(nodes))
        ranks += oracle_ranks(group)
    visible = np.array([[_above(upper, lower) for upper in nodes] for lower in nodes], np.bool_)
    visible = visible.reshape(len(nodes), len(nodes))
    return OracleTree(
        input_ids=[prefix[-1] for _, _, prefix in nodes],
        position_ids=[len(prefix) - 1 for _, _, prefix in nodes],
        subtree_end=[int(np.flatnonzero(column)[-1]) + 1 for column in visible.T],
        rows=rows,
        targets=targets,
        candidate_offsets=_sums([len(plain(y)) for group in groups for y in group.responses]),
        group_offsets=_sums([len(group.responses) for group in groups]),
        group_rows=group_rows,
        ranks=ranks,
        visible=visible,
    )


def oracle_ranks(group: Group) -> list[int]:
    """Dense ranks by counting distinct better values, identical responses at the best of theirs."""
    k = len(group.responses)
    if group.scores is not None:
        keys = [-float(score) for score in group.scores]
    elif group.ranks is not None:
        keys = [int(rank) for rank in group.ranks]
    else:
        keys = [0] * k
    texts = [plain(response) for response in group.responses]
    best = [min(keys[d] for d in range(k) if texts[d] == texts[c]) for c in range(k)]
    return [len({other for other in best if other < own}) for own in best]


def _above(upper: tuple[int, int | None, Prefix], lower: tuple[int, int | None, Prefix]) -> bool:
    """Is `upper` the same node as `lower` or one on its way to the root?"""
    same_branch = upper[0] == lower[0] and upper[1] in (None, lower[1])
    return same_branch and lower[2][: len(upper[2])] == upper[2]


def _sums(lengths: list[int]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths) + 1)]
