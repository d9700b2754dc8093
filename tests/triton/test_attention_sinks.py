"""Attention sinks and strides on the Triton kernels: the reference with one more column, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.triton.device import DEVICE
from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna_kernels import selective_logprobs
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.tree import Group, pack_groups

TREE = pack_groups([Group([1, 2, 3], [[4, 5], [4, 6, 7], [8]]), Group([9], [[3, 2], [3]])])
T = TREE.num_tokens
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def evaluate(
    leaves: list[Tensor], backend: str, window: int | None, softcap: float | None, *, last_apart: bool = False
) -> list[Tensor]:
    """out, lse and the gradients of q, k, v and sinks, for float32 leaves with neighbours in memory or not."""

    def lay(x: Tensor) -> Tensor:
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0] if last_apart else x

    own = [lay(x).detach().requires_grad_() for x in leaves]
    end, depth = (lay(x.to(leaves[0].device)) for x in (TREE.subtree_end, TREE.position_ids))
    out, lse = tree_attention(
        own[0], own[1], own[2], end, position_ids=depth, window=window, softcap=softcap, sinks=own[3],
        return_lse=True, backend=backend,
    )  # fmt: skip
    g = torch.Generator().manual_seed(3)
    upstream = [lay(torch.randn(x.shape, generator=g).to(x)) for x in (out, lse)]
    return [x.detach().cpu() for x in (out, lse, *torch.autograd.grad((out, lse), own, upstream))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window,softcap", [(None, None), (2, 3.0)])
def test_sinks_equal_one_more_column(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, heads, T, 8, generator=g).to(dtype) for heads in (4, 2, 2)]
    leaves.append(torch.tensor([0.5, float("-inf"), 4.0, -2.0], dtype=dtype))
    truth = evaluate([x.double() for x in leaves], "reference", window, softcap)
    book = evaluate(leaves, "reference", window, softcap)
    for last_apart in (False, True):
        got = evaluate([x.to(DEVICE) for x in leaves], "triton", window, softcap, last_apart=last_apart)
        for name, a, b, c in zip(NAMES, got, book, truth, strict=True):
            rounded = torch.float32 if name == "lse" else dtype
            assert_as_good_as_reference(a, b, c, name, rounded=rounded, scale=1.0)


def test_targets_of_logits_may_be_strided() -> None:
    logits = torch.randn(6, 9, device=DEVICE)
    targets = torch.tensor([[3, 0], [8, 1], [-100, 2], [5, 3], [0, 4], [7, 5]], device=DEVICE)[:, 0]
    assert not targets.is_contiguous()
    got, expected = (selective_logprobs(logits, targets, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(got, expected)
