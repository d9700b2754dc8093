"""Groups as given by the user, validated and flattened on the host for `tuna_kernels.tree`.

Everything here is numpy on the CPU. Each sequence is converted once, checks run on the concatenation of all
sequences where possible, and errors name the group, the candidate and the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = Sequence[int] | npt.NDArray[Any] | torch.Tensor
Numbers: TypeAlias = Sequence[float] | npt.NDArray[Any] | torch.Tensor


@dataclass(frozen=True)
class Group:
    """A prompt and its k >= 1 candidate responses, as token ids.

    Token ids may be lists, tuples, numpy arrays or one-dimensional torch tensors of any integer type. They are
    copied and checked later, by `pack_groups`, `plan_rows` and `tree_tokens`, whose errors name the group.

    Attributes:
        prompt: token ids, at least one: its last row predicts the first token of every response.
        responses: k sequences of token ids, none empty.
        scores: k finite numbers, **higher is better**, or None.
        ranks: k integers, **lower is better** (any integers, with gaps or ties), or None. At most one of
            `scores` and `ranks`; with neither, all candidates are tied: scoring only.
    """

    prompt: Integers
    responses: Sequence[Integers]
    scores: Numbers | None = None
    ranks: Integers | None = None


@dataclass(frozen=True, eq=False)
class FlatGroups:
    """All groups concatenated in the given order. G groups, C candidates.

    Attributes:
        prompts: int64, all prompt tokens; group g has `prompt_offsets[g]:prompt_offsets[g + 1]`.
        prompt_offsets: int64 [G + 1].
        responses: int64, all response tokens; candidate c has `response_offsets[c]:response_offsets[c+1]`.
        response_offsets: int64 [C + 1].
        group_offsets: int64 [G + 1], candidates of group g.
        keys: int64 [C], comparable within a group: lower is better, equal is a tie.
        scores: float64 [C], as given; NaN without scores.
    """

    prompts: IntArray
    prompt_offsets: IntArray
    responses: IntArray
    response_offsets: IntArray
    group_offsets: IntArray
    keys: IntArray
    scores: FloatArray

    @property
    def prompt_lengths(self) -> IntArray:
        """Prompt tokens of each group, int64 [G]."""
        return np.diff(self.prompt_offsets)

    @property
    def response_lengths(self) -> IntArray:
        """Response tokens of each candidate, int64 [C]."""
        return np.diff(self.response_offsets)

    @property
    def candidate_groups(self) -> IntArray:
        """The group of each candidate, int64 [C]."""
        return np.repeat(np.arange(len(self.prompt_offsets) - 1), np.diff(self.group_offsets))


def flatten_groups(groups: Sequence[Group]) -> FlatGroups:
    """Check and flatten `groups`.

    Raises:
        TypeError: something is not a `Group`, or tokens, ranks or scores have the wrong type.
        ValueError: an empty prompt, response or list of responses, a negative token, the wrong number of scores or
            ranks, a non-finite score, both scores and ranks.
    """
    prompts: list[IntArray] = []
    responses: list[IntArray] = []
    candidates: list[int] = []
    ranks: list[IntArray] = []
    scores: list[FloatArray] = []
    for g, group in enumerate(groups):
        if not isinstance(group, Group):
            raise TypeError(f"groups[{g}] is a {type(group).__name__}, not a Group")
        where = f"groups[{g}]"
        if not hasattr(group.responses, "__len__"):
            kind = type(group.responses).__name__
            raise TypeError(f"{where}.responses is a {kind}, not a sequence of responses")
        count = len(group.responses)
        if count == 0:
            raise ValueError(f"{where}.responses is empty: a group has at least one candidate")
        prompts.append(_integers(group.prompt, f"{where}.prompt"))
        responses += [_integers(y, f"{where}.responses[{c}]") for c, y in enumerate(group.responses)]
        candidates.append(count)
        group_ranks, group_scores = _judgements(group, count, where)
        ranks.append(group_ranks)
        scores.append(group_scores)
    all_scores = np.concatenate([np.empty(0, np.float64), *scores])
    by_score = np.unique(-all_scores, return_inverse=True)[1]
    flat = FlatGroups(
        prompts=_join(prompts),
        prompt_offsets=offsets([len(x) for x in prompts]),
        responses=_join(responses),
        response_offsets=offsets([len(y) for y in responses]),
        group_offsets=offsets(candidates),
        keys=np.where(np.isnan(all_scores), _join(ranks), by_score),
        scores=all_scores,
    )
    _check_tokens(flat)
    return flat


def dense_ranks(flat: FlatGroups, order: IntArray, common: IntArray) -> IntArray:
    """Ranks from 0, without gaps, within each group; identical responses tie at the best of their ranks.

    Args:
        flat: the groups.
        order: int64 [C], candidates of each group in lexicographic order of their responses.
        common: int64 [C], the length of the common prefix of candidates `order[s]` and `order[s - 1]`.

    Returns:
        int64 [C], 0 is best, in candidate order.
    """
    lengths, groups = flat.response_lengths[order], flat.candidate_groups
    if len(order) == 0:
        return np.empty(0, np.int64)
    # In sorted order a response that is a prefix of the one before is identical to it: a proper prefix would come
    # first.
    same = np.zeros(len(order), np.bool_)
    same[1:] = common[1:] == lengths[1:]
    firsts = np.flatnonzero(~same)
    best = np.minimum.reduceat(flat.keys[order], firsts)
    keys = np.empty_like(flat.keys)
    keys[order] = np.repeat(best, np.diff(np.append(firsts, len(order))))

    by_rank = np.lexsort((keys, groups))
    step = np.zeros(len(order), np.int64)
    step[1:] = keys[by_rank][1:] != keys[by_rank][:-1]
    # A group's first candidate is rank 0: subtract the sum of the steps of previous groups.
    level = np.cumsum(step)
    ranks = np.empty(len(order), np.int64)
    ranks[by_rank] = level - level[flat.group_offsets[:-1]][groups]
    return ranks


def offsets(lengths: Sequence[int] | IntArray) -> IntArray:
    """Prefix sums of n lengths with a leading zero: int64 [n + 1]."""
    result = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def _join(parts: list[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _judgements(group: Group, count: int, where: str) -> tuple[IntArray, FloatArray]:
    """Given ranks, int64 [count], 0 without; given scores, float64 [count], NaN without."""
    if group.scores is not None and group.ranks is not None:
        raise ValueError(f"{where} has both scores and ranks; give one of them")
    if group.ranks is not None:
        ranks = _integers(group.ranks, f"{where}.ranks")
        _check_count(len(ranks), count, f"{where}.ranks")
        return ranks, np.full(count, np.nan)
    if group.scores is None:
        return np.zeros(count, np.int64), np.full(count, np.nan)
    scores = _vector(group.scores, "iuf", f"{where}.scores").astype(np.float64)
    _check_count(len(scores), count, f"{where}.scores")
    for c in np.flatnonzero(~np.isfinite(scores)):
        raise ValueError(f"{where}.scores[{c}] = {scores[c]} is not finite")
    return np.zeros(count, np.int64), scores


def _check_count(given: int, count: int, where: str) -> None:
    if given != count:
        raise ValueError(f"{where} has {given} values for {count} responses")


def _check_tokens(flat: FlatGroups) -> None:
    for g in np.flatnonzero(flat.prompt_lengths == 0):
        raise ValueError(f"groups[{g}].prompt is empty; give it at least a BOS token")
    for c in np.flatnonzero(flat.response_lengths == 0):
        raise ValueError(f"{_candidate_name(flat, c)} is empty")
    for i in np.flatnonzero(flat.prompts < 0):
        g, within = _locate(flat.prompt_offsets, i)
        raise ValueError(f"groups[{g}].prompt[{within}] = {flat.prompts[i]} is negative: not a token id")
    for i in np.flatnonzero(flat.responses < 0):
        c, within = _locate(flat.response_offsets, i)
        place = f"{_candidate_name(flat, c)}[{within}]"
        raise ValueError(f"{place} = {flat.responses[i]} is negative: not a token id")


def _locate(bounds: IntArray, flat_index: np.intp) -> tuple[np.intp, np.intp]:
    """The segment of `bounds` that contains a flat index, and the index within it."""
    segment = np.searchsorted(bounds, flat_index, side="right") - 1
    return segment, flat_index - bounds[segment]


def _candidate_name(flat: FlatGroups, candidate: np.intp) -> str:
    g, within = _locate(flat.group_offsets, candidate)
    return f"groups[{g}].responses[{within}]"


def _integers(values: Integers, where: str) -> IntArray:
    array = _vector(values, "iu", where)
    # Only unsigned 64-bit integers do not fit; numpy would wrap them to negative ones.
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        i = int(array.argmax())
        raise ValueError(f"{where}[{i}] = {array[i]} does not fit into a signed 64-bit integer")
    return array.astype(np.int64, copy=False)


def _vector(values: Integers | Numbers, kinds: str, where: str) -> npt.NDArray[Any]:
    """A one-dimensional array whose dtype kind is one of `kinds`; an empty one may have any dtype."""
    if isinstance(values, str | bytes):
        raise TypeError(f"{where} is text ({values[:20]!r}), not a sequence of numbers")
    if isinstance(values, torch.Tensor):
        host = values.detach().cpu()
        # numpy has no bfloat16; float64 holds every value of the smaller floats.
        values = (host.double() if host.is_floating_point() else host).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TypeError(f"{where} is not a flat sequence of numbers: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"{where} must have one dimension, not shape {array.shape}")
    if array.size and array.dtype.kind not in kinds:
        wanted: Any = Real if "f" in kinds else Integral
        named = "a number" if "f" in kinds else "an integer"
        for i, value in enumerate(values):
            if isinstance(value, bool | np.bool_) or not isinstance(value, wanted):
                raise TypeError(f"{where}[{i}] = {value!r} is not {named}")
        raise TypeError(f"{where} holds values that are not 64-bit numbers (dtype {array.dtype})")
    return array
