"""The packed tree is the one brute force builds, and its rule shows each slot exactly its own prefix."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tuna_kernels.oracles_tree import oracle_ranks, oracle_tree, plain, rule, sequences
from tuna_kernels.loss_counts import LossCounts
from tuna_kernels.tree import Group, PackedTree, Share, pack_groups, plan_rows, tree_tokens

SHARES: tuple[Share, ...] = ("tree", "prompt", "none")
shares = st.sampled_from(SHARES)
# Few different tokens, so that prefixes meet often; the large one takes more than four bytes.
tokens = st.lists(st.sampled_from([0, 1, 256, 2**40]), min_size=1, max_size=5)
KINDS: list[Any] = [
    list,
    tuple,
    lambda x: np.array(x, np.int64),
    lambda x: np.array(x, np.uint64),
    torch.tensor,
]


@st.composite
def group_strategy(draw: st.DrawFn) -> Group:
    """A group with duplicates, candidates that are prefixes of others, and every kind of token sequence."""
    responses = draw(st.lists(tokens, min_size=1, max_size=4))
    for original in list(responses):
        match draw(st.sampled_from(["", "", "same", "prefix", "longer"])):
            case "same":
                responses.append(original)
            case "prefix":
                responses.append(original[: draw(st.integers(1, len(original)))])
            case "longer":
                responses.append(original + draw(tokens))
    k = len(responses)
    kind = draw(st.sampled_from(KINDS))
    scores = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 1.0, 1.0 + 1e-12, 1e300]), min_size=k, max_size=k)
    ranks = st.lists(st.sampled_from([-(2**62), -1, 0, 3, 2**62]), min_size=k, max_size=k)
    judged = draw(st.sampled_from(["scores", "ranks", "neither"]))
    return Group(
        prompt=kind(draw(tokens)),
        responses=[kind(response) for response in responses],
        scores=draw(scores) if judged == "scores" else None,
        ranks=draw(ranks) if judged == "ranks" else None,
    )


groups_strategy = st.lists(group_strategy(), max_size=4)


def arrays(tree: PackedTree) -> dict[str, Any]:
    """All fields as lists, to compare."""
    return {
        name: value if isinstance(value, int) else value.tolist()
        for name, value in vars(tree).items()
        if name != "scores_given"
    } | {"scores_given": [None if np.isnan(score) else score for score in tree.scores_given.tolist()]}


def random_groups(seed: int, count: int, k: int, length: int, alphabet: int) -> list[Group]:
    """`count` groups of up to k responses of up to `length` tokens."""
    random = np.random.default_rng(seed)

    def sequence() -> np.ndarray[Any, Any]:
        return random.integers(alphabet, size=random.integers(1, length + 1))

    return [Group(sequence(), [sequence() for _ in range(random.integers(1, k + 1))]) for _ in range(count)]


def test_example_of_the_design() -> None:
    """Law: the worked example of the design page comes out verbatim."""
    a, b, c, d, e = range(10, 15)
    tree = pack_groups([Group(prompt=[a, b], responses=[[c, d], [c, e]], scores=[0.5, 2.0])])
    assert tree.input_ids.tolist() == [a, b, c, d, e]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 3]
    assert tree.subtree_end.tolist() == [5, 5, 5, 4, 5]
    assert tree.rows.tolist() == [1, 2, 1, 2]
    assert tree.targets.tolist() == [c, d, c, e]
    assert tree.candidate_offsets.tolist() == [0, 2, 4]
    assert tree.group_offsets.tolist() == [0, 2]
    assert tree.group_rows_host.tolist() == [0, 5]
    assert tree.ranks.tolist() == [1, 0]
    assert tree.scores_given.tolist() == [0.5, 2.0]
    assert tree.unshared_tokens == 8
    assert (tree.num_tokens, tree.num_slots, tree.num_candidates, tree.num_groups) == (5, 4, 2, 1)


@given(groups_strategy, shares)
def test_equals_brute_force(groups: list[Group], share: Any) -> None:
    """Law: the tree, its attention rule, slots and ranks are those of brute force over all prefixes."""
    tree, oracle = pack_groups(groups, share=share), oracle_tree(groups, share)
    assert tree.input_ids.tolist() == oracle.input_ids
    assert tree.position_ids.tolist() == oracle.position_ids
    assert tree.subtree_end.tolist() == oracle.subtree_end
    assert np.array_equal(rule(tree.subtree_end), oracle.visible)
    assert tree.rows.tolist() == oracle.rows
    assert tree.targets.tolist() == oracle.targets
    assert tree.candidate_offsets.tolist() == oracle.candidate_offsets
    assert tree.group_offsets.tolist() == oracle.group_offsets
    assert tree.group_rows_host.tolist() == oracle.group_rows
    assert tree.ranks.tolist() == oracle.ranks


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("alphabet", [2, 5])
def test_equals_brute_force_on_larger_groups(share: Any, alphabet: int) -> None:
    """Law: as above, on wider and deeper trees than the property test draws."""
    groups = random_groups(seed=alphabet, count=6, k=12, length=15, alphabet=alphabet)
    tree, oracle = pack_groups(groups, share=share), oracle_tree(groups, share)
    assert np.array_equal(rule(tree.subtree_end), oracle.visible)
    assert tree.input_ids.tolist() == oracle.input_ids
    assert tree.rows.tolist() == oracle.rows


@given(groups_strategy, shares)
def test_a_slot_sees_its_own_prefix(groups: list[Group], share: Any) -> None:
    """Law: the rows that a slot's row sees are, by position, the candidate's own tokens before the slot."""
    tree = pack_groups(groups, share=share)
    seen = rule(tree.subtree_end)
    slot = 0
    for group in groups:
        prompt = len(plain(group.prompt))
        for sequence in sequences(group):
            for length in range(prompt, len(sequence)):
                visible = torch.from_numpy(np.flatnonzero(seen[tree.rows[slot]]))
                visible = visible[tree.position_ids[visible].argsort()]
                assert tree.position_ids[visible].tolist() == list(range(length))
                assert tuple(tree.input_ids[visible].tolist()) == sequence[:length]
                assert int(tree.targets[slot]) == sequence[length]
                slot += 1
    assert slot == tree.num_slots


@given(groups_strategy)
def test_number_of_rows(groups: list[Group]) -> None:
    """Law: distinct prefixes; prompt once and responses whole; full sequences: what the three shares pack."""
    prefixes, prompt_once, whole = [], [], []
    for group in groups:
        full, prompt = sequences(group), len(plain(group.prompt))
        prefixes.append(len({seq[:n] for seq in full for n in range(1, len(seq) + 1)}))
        whole.append(sum(map(len, full)))
        prompt_once.append(whole[-1] - prompt * (len(full) - 1))
    for share, expected in zip(SHARES, (prefixes, prompt_once, whole), strict=True):
        tree = pack_groups(groups, share=share)
        assert np.diff(tree.group_rows_host).tolist() == expected
        assert tree_tokens(groups, share=share).tolist() == expected
        assert tree_tokens(groups, share=share).dtype == np.int64
        assert tree.num_tokens == sum(expected)
        assert tree.unshared_tokens == sum(whole)


@given(groups_strategy.filter(len), shares, st.data())
def test_packing_alone_or_with_others(groups: list[Group], share: Any, data: st.DataObject) -> None:
    """Law: what stands around a group shifts its rows, candidates and slots, and changes nothing else."""
    g = data.draw(st.integers(0, len(groups) - 1))
    tree, alone = pack_groups(groups, share=share), pack_groups([groups[g]], share=share)
    row, end = tree.group_rows_host[g : g + 2]
    first, last = tree.group_offsets_host[g : g + 2]
    slots = slice(*tree.candidate_offsets_host[[first, last]])
    assert tree.input_ids[row:end].tolist() == alone.input_ids.tolist()
    assert tree.position_ids[row:end].tolist() == alone.position_ids.tolist()
    assert (tree.subtree_end[row:end] - row).tolist() == alone.subtree_end.tolist()
    assert (tree.rows[slots] - row).tolist() == alone.rows.tolist()
    assert tree.targets[slots].tolist() == alone.targets.tolist()
    assert tree.ranks[first:last].tolist() == alone.ranks.tolist()


@given(group_strategy(), st.randoms(use_true_random=False))
def test_rows_do_not_depend_on_the_order_of_candidates(group: Group, random: Any) -> None:
    """Law: under share="tree" permuted candidates give the same rows, slots and ranks permuted alike."""
    order = list(range(len(group.responses)))
    random.shuffle(order)
    given_scores: Any = group.scores
    given_ranks: Any = group.ranks
    permuted = Group(
        group.prompt,
        [group.responses[c] for c in order],
        scores=given_scores and [given_scores[c] for c in order],
        ranks=given_ranks and [given_ranks[c] for c in order],
    )
    tree, other = pack_groups([group]), pack_groups([permuted])
    for name in ("input_ids", "position_ids", "subtree_end"):
        assert torch.equal(getattr(tree, name), getattr(other, name))
    assert other.ranks.tolist() == tree.ranks[order].tolist()
    bounds, other_bounds = tree.candidate_offsets_host, other.candidate_offsets_host
    for place, c in enumerate(order):
        own = slice(bounds[c], bounds[c + 1])
        theirs = slice(other_bounds[place], other_bounds[place + 1])
        assert torch.equal(tree.rows[own], other.rows[theirs])
        assert torch.equal(tree.targets[own], other.targets[theirs])


@given(groups_strategy, shares)
def test_deterministic_and_leaves_its_input(groups: list[Group], share: Any) -> None:
    """Law: the same groups give the same tree twice, so the first time changed nothing of the input."""
    assert arrays(pack_groups(groups, share=share)) == arrays(pack_groups(groups, share=share))


@pytest.mark.parametrize(
    ("scores", "ranks", "expected"),
    [
        ([0.1, 0.3, 0.2], None, [2, 0, 1]),
        ([1.0, 1.0 + 1e-12, 1.0], None, [1, 0, 1]),  # distinct in float64 only
        ([5, 7, 5], None, [1, 0, 1]),
        (np.array([0.5, 2.0, 1.0], np.float16), None, [2, 0, 1]),
        (torch.tensor([0.5, 2.0, 1.0], dtype=torch.bfloat16), None, [2, 0, 1]),
        (None, [1, 2, 3], [0, 1, 2]),
        (None, [40, -3, 40], [1, 0, 1]),
        (None, torch.tensor([2, 0, 1]), [2, 0, 1]),
        (None, None, [0, 0, 0]),
    ],
)
def test_ranks_are_dense(scores: Any, ranks: Any, expected: list[int]) -> None:
    """Law: ranks count the distinct better values, in float64; scores are higher, ranks lower is better."""
    tree = pack_groups([Group([9], [[1], [2], [3]], scores=scores, ranks=ranks)])
    assert tree.ranks.tolist() == expected
    assert tree.ranks_host.tolist() == expected


@pytest.mark.parametrize("share", SHARES)
def test_identical_responses_are_tied(share: Any) -> None:
    """Law: identical responses take the best of their ranks, and the gap that leaves is closed."""
    group = Group([9], [[1, 2], [3], [1, 2], [1]], ranks=[3, 1, 0, 2])
    assert pack_groups([group], share=share).ranks.tolist() == [0, 1, 0, 2]
    assert oracle_ranks(group) == [0, 1, 0, 2]


def test_scores_given() -> None:
    """Law: scores come back in float64 as they were, NaN for groups without."""
    groups = [Group([1], [[1], [1]], scores=[0.1, 0.7]), Group([1], [[1]]), Group([1], [[1]], ranks=[4])]
    given_scores = pack_groups(groups).scores_given
    assert given_scores.dtype == torch.float64
    assert given_scores[:2].tolist() == [0.1, 0.7]
    assert given_scores[2:].isnan().all()


def test_no_groups() -> None:
    """Law: no groups give a tree with nothing in it that works."""
    for share in SHARES:
        tree = pack_groups([], share=share)
        assert (tree.num_tokens, tree.num_slots, tree.num_candidates, tree.num_groups) == (0, 0, 0, 0)
        assert tree.candidate_offsets.tolist() == tree.group_offsets.tolist() == [0]
        assert tree.group_rows_host.tolist() == [0]
        assert tree.unshared_tokens == 0
        assert tree.loss_counts() == LossCounts(groups=0, pairs_by_lag=(), tokens=0)
        assert tree_tokens([], share=share).tolist() == []
        assert plan_rows([], 10, share=share) == []


@given(groups_strategy)
def test_dtypes_and_host_copies(groups: list[Group]) -> None:
    """Law: tensors are int64 (scores float64); host copies are equal and share no memory with the tensors."""
    tree = pack_groups(groups)
    for name, value in vars(tree).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.float64 if name == "scores_given" else torch.int64)
            assert value.dim() == 1
    for name in ("candidate_offsets", "group_offsets", "ranks"):
        host = getattr(tree, f"{name}_host")
        assert host.dtype == np.int64
        assert getattr(tree, name).tolist() == host.tolist()
        getattr(tree, name).fill_(-7)
        assert -7 not in host


def test_to_moves_every_tensor() -> None:
    """Law: `.to` moves all tensors and keeps the host side and the numbers."""
    tree = pack_groups([Group([1, 2], [[3], [3, 4]], ranks=[0, 1])])
    meta = tree.to("meta")
    for name, value in vars(meta).items():
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta"
            assert value.shape == getattr(tree, name).shape
    assert meta.ranks_host is tree.ranks_host
    assert (meta.num_tokens, meta.num_slots, meta.num_candidates, meta.num_groups) == (4, 3, 2, 1)
    assert pack_groups([Group([1], [[2]])], device="meta").input_ids.device.type == "meta"
    assert arrays(tree.to("cpu")) == arrays(tree)


@given(groups_strategy)
def test_loss_counts(groups: list[Group]) -> None:
    """Law: counts are groups, slots, and pairs by rank difference, counted pair by pair."""
    by_lag: dict[int, int] = {}
    for group in groups:
        for one, other in combinations(oracle_ranks(group), 2):
            if one != other:
                by_lag[abs(one - other)] = by_lag.get(abs(one - other), 0) + 1
    counts = pack_groups(groups).loss_counts()
    assert counts.groups == len(groups)
    assert counts.tokens == sum(len(plain(y)) for group in groups for y in group.responses)
    assert {lag: n for lag, n in enumerate(counts.pairs_by_lag, 1) if n} == by_lag


@given(groups_strategy, shares, st.integers(0, 60))
def test_plan_rows(groups: list[Group], share: Any, extra: int) -> None:
    """Laws: every group in one row, no row above the limit, no two rows that would fit into one, in order."""
    sizes = tree_tokens(groups, share=share)
    limit = int(sizes.max(initial=1)) + extra
    plan = plan_rows(groups, limit, share=share)
    assert sorted(g for row in plan for g in row) == list(range(len(groups)))
    assert all(row and row == sorted(row) for row in plan)
    assert [row[0] for row in plan] == sorted(row[0] for row in plan)
    totals = [pack_groups([groups[g] for g in row], share=share).num_tokens for row in plan]
    assert all(total <= limit for total in totals)
    assert all(one + other > limit for one, other in combinations(totals, 2))
    assert plan == plan_rows(groups, limit, share=share)


def sized(size: int) -> Group:
    """A group of `size` tokens."""
    return Group([0] * (size - 1), [[1]])


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([4, 4, 6, 6], 10, [[0, 2], [1, 3]]),  # in the order given it would take three rows
        ([3, 8, 9, 2], 11, [[0, 1], [2, 3]]),  # the fullest row that fits, not the first
        ([5, 5, 5], 5, [[0], [1], [2]]),
        ([2, 2, 2, 2], 100, [[0, 1, 2, 3]]),
    ],
)
def test_plan_rows_packs_tightly(sizes: list[int], limit: int, expected: list[list[int]]) -> None:
    """Law: largest first, each into the fullest row that takes it."""
    assert plan_rows([sized(size) for size in sizes], limit) == expected


def test_plan_rows_names_the_group_that_is_too_large() -> None:
    """Law: a group above the limit is an error with its index, its tokens and the limit."""
    with pytest.raises(ValueError, match=r"groups\[1\] takes 6 tokens, more than max_tokens = 5"):
        plan_rows([sized(5), sized(6)], 5)
    shared = Group([1, 2, 3], [[4, 5], [4, 6]])
    assert plan_rows([shared], 6) == [[0]]
    with pytest.raises(ValueError, match=r"groups\[0\] takes 7 tokens, more than max_tokens = 6"):
        plan_rows([shared], 6, share="prompt")


@pytest.mark.parametrize(
    ("limit", "error"),
    [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("8", TypeError)],
)
def test_plan_rows_refuses_a_bad_limit(limit: Any, error: type[Exception]) -> None:
    """Law: the limit is an integer of at least 1; the message gives the value."""
    with pytest.raises(error, match=f"max_tokens = {limit!r}"):
        plan_rows([], limit)


GOOD = Group([1], [[2]])
VALUE_ERRORS: list[tuple[Group, str]] = [
    (Group([], [[1]]), r"groups\[1\]\.prompt is empty"),
    (Group([1], []), r"groups\[1\]\.responses is empty"),
    (Group([1], [[1], []]), r"groups\[1\]\.responses\[1\] is empty"),
    (Group([1, -5], [[1]]), r"groups\[1\]\.prompt\[1\] = -5 is negative"),
    (Group([1], [[1], [1, 2, -2]]), r"groups\[1\]\.responses\[1\]\[2\] = -2 is negative"),
    (Group([1], [[-1], [1]]), r"groups\[1\]\.responses\[0\]\[0\] = -1 is negative"),
    (Group([1], [[2**63]]), r"groups\[1\]\.responses\[0\]\[0\] = 9223372036854775808 does not fit"),
    (Group([1], [1, 2]), r"groups\[1\]\.responses\[0\] must have one dimension, not shape \(\)"),  # type: ignore[list-item]
    (Group(np.zeros((2, 2), int), [[1]]), r"groups\[1\]\.prompt must have one dimension, not shape \(2, 2\)"),
    (Group([1], [[1], [2]], scores=[1.0]), r"groups\[1\]\.scores has 1 values for 2 responses"),
    (Group([1], [[1], [2]], ranks=[0, 1, 2]), r"groups\[1\]\.ranks has 3 values for 2 responses"),
    (Group([1], [[1], [2]], ranks=[]), r"groups\[1\]\.ranks has 0 values for 2 responses"),
    (Group([1], [[1], [2]], scores=[1.0, float("nan")]), r"groups\[1\]\.scores\[1\] = nan is not finite"),
    (Group([1], [[1], [2]], scores=[float("-inf"), 1]), r"groups\[1\]\.scores\[0\] = -inf is not finite"),
    (Group([1], [[1]], scores=[0.5], ranks=[0]), r"groups\[1\] has both scores and ranks"),
]
TYPE_ERRORS: list[tuple[Any, str]] = [
    (([1], [[1]]), r"groups\[1\] is a tuple, not a Group"),
    (Group("text", [[1]]), r"groups\[1\]\.prompt is text \('text'\)"),  # type: ignore[arg-type]
    (Group([1], "text"), r"groups\[1\]\.responses\[0\] is text"),  # type: ignore[arg-type]
    (Group([1], (x for x in [[1]])), r"groups\[1\]\.responses is a generator"),  # type: ignore[arg-type]
    (Group([1], [[1, 2.5]]), r"groups\[1\]\.responses\[0\]\[1\] = 2\.5 is not an integer"),  # type: ignore[list-item]
    (Group([1], [[1], [1, None]]), r"groups\[1\]\.responses\[1\]\[1\] = None is not an integer"),  # type: ignore[list-item]
    (Group([1], [["7"]]), r"groups\[1\]\.responses\[0\]\[0\] = '7' is not an integer"),  # type: ignore[list-item]
    (Group([True], [[1]]), r"groups\[1\]\.prompt\[0\] = True is not an integer"),
    (Group(torch.ones(2), [[1]]), r"groups\[1\]\.prompt\[0\] = .*1\.0.* is not an integer"),
    (Group([2**80], [[1]]), r"groups\[1\]\.prompt holds values that are not 64-bit"),
    (Group([1], [[1, [2]]]), r"groups\[1\]\.responses\[0\] is not a flat sequence"),  # type: ignore[list-item]
    (Group([1], [[1]], ranks=[0.5]), r"groups\[1\]\.ranks\[0\] = 0\.5 is not an integer"),  # type: ignore[list-item]
    (Group([1], [[1]], scores=["a"]), r"groups\[1\]\.scores\[0\] = 'a' is not a number"),  # type: ignore[list-item]
]


@pytest.mark.parametrize("call", [pack_groups, tree_tokens, lambda groups: plan_rows(groups, 100)])
@pytest.mark.parametrize(
    ("error", "bad", "message"),
    [(ValueError, *case) for case in VALUE_ERRORS] + [(TypeError, *case) for case in TYPE_ERRORS],
)
def test_bad_groups_are_named(call: Any, error: type[Exception], bad: Any, message: str) -> None:
    """Law: a bad group raises in every entry point, naming group, candidate, position and value."""
    with pytest.raises(error, match=message):
        call([GOOD, bad, GOOD])


@pytest.mark.parametrize("call", [pack_groups, tree_tokens, lambda groups, share: plan_rows(groups, 100, share=share)])
def test_unknown_share(call: Any) -> None:
    """Law: an unknown share is refused with the known ones named."""
    with pytest.raises(ValueError, match=r"share = 'all' is not one of 'tree', 'prompt', 'none'"):
        call([GOOD], share="all")
