"""Tree attention of tiny, huge and peaked scores, odd head sizes and few rows: as good as the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tuna_kernels.attention.test_tree_attention import CPU, groups
from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.tree import Group, pack_groups

NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize("backend", ["torch", CPU])
@given(
    forest=groups,
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1)]),
    sizes=st.sampled_from([(1, 1), (3, 3), (8, 8), (17, 5), (33, 33), (16, 65)]),
    spread=st.sampled_from([1e-3, 1.0, 20.0, 300.0, 3e4]),
    scale=st.sampled_from([None, 0.0, -1.0, 1e-6, 30.0]),
    softcap=st.sampled_from([None, None, 4.0, 1e-3, 1e4]),
    window=st.sampled_from([None, None, 1, 3, 10**9]),
    with_lse=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_scales_and_sizes(
    backend: str,
    forest: list[Group],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    spread: float,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    with_lse: bool,
    seed: int,
) -> None:
    """The reference's bound, or some roundings of the scores; for dq and dk some roundings of the summed terms: where
    a row sees one key they cancel, and nothing but rounding is left."""
    tree = pack_groups(forest)
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    leaves = [torch.randn(1, h, tree.num_tokens, d, generator=g) for h, d in shapes]
    leaves[0] *= spread
    rows = (1, heads[0], tree.num_tokens)
    upstream = [torch.randn(shape, generator=g) for shape in ((*rows, sizes[1]), rows)]

    def evaluate(dtype: torch.dtype, name: str) -> list[Tensor]:
        own = [x.to(dtype).requires_grad_() for x in leaves]
        results = tree_attention(
            own[0], own[1], own[2], tree.subtree_end, position_ids=tree.position_ids, window=window, scale=scale,
            softcap=softcap, return_lse=True, backend=name,
        )  # fmt: skip
        used = results if with_lse else results[:1]
        gradients = torch.autograd.grad(used, own, [u.to(dtype) for u in upstream[: len(used)]])
        return [x.detach() for x in (*results, *gradients)]

    factor = 1 / math.sqrt(sizes[0]) if scale is None else abs(scale)
    score = max(1.0, 4 * factor * spread * math.sqrt(sizes[0]))  # what is rounded, before a cap, moves all results
    term = factor * tree.num_tokens * 30 * math.sqrt(sizes[1]) * score
    of_terms = {"dq": term, "dk": term * spread}
    truth, book = (evaluate(dtype, "reference") for dtype in (torch.float64, torch.float32))
    for name, a, b, c in zip(NAMES, evaluate(torch.float32, backend), book, truth, strict=True):
        assert_as_good_as_reference(a, b, c, name, scale=of_terms.get(name, score))


@pytest.mark.parametrize("backend", ["torch", CPU])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("peak", [300.0, 2e4])
def test_large_scores_round_the_log_sum_exp_and_not_the_gradient(backend: str, with_lse: bool, peak: float) -> None:
    """Scores around ``peak``, close together: e^(z - lse) with a float32 lse would be off by peak * 2⁻²⁴."""
    tree = pack_groups([Group([1] * 5, [[1, 2, 3], [2, 3, 4, 5], [3]])])
    g = torch.Generator().manual_seed(0)
    q, k = torch.ones(1, 2, tree.num_tokens, 4), torch.zeros(1, 2, tree.num_tokens, 4)
    k[..., 0] = peak + torch.randint(-8, 9, k.shape[:3], generator=g) / 4  # exact in float32, in any order of sums
    v, upstream = (torch.randn(1, 2, tree.num_tokens, 4, generator=g) for _ in range(2))

    def evaluate(dtype: torch.dtype, name: str) -> Tensor:
        value = v.to(dtype).requires_grad_()
        out, lse = tree_attention(
            q.to(dtype).requires_grad_(), k.to(dtype), value, tree.subtree_end, scale=1.0, return_lse=True, backend=name
        )
        loss = (out * upstream.to(dtype)).sum() + (lse.sum() if with_lse else 0)
        return torch.autograd.grad(loss, value)[0]

    truth, book = (evaluate(dtype, "reference") for dtype in (torch.float64, torch.float32))
    assert_as_good_as_reference(evaluate(torch.float32, backend), book, truth, "dv")
