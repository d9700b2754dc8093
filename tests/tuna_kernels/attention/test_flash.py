"""The flash-attn route: trees as batches of sequences, parts merged by log-sum-exp, the whole softmax in each backward.

flash-attn has no CPU build. Here a module of its name stands in whose two functions have its documented signatures
(flash-attn 2.8, `flash_attn_interface.py`) and compute the documented meaning in float64.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tuna_kernels.attention.test_tree_attention import groups
from tuna_kernels.attention import flash
from tuna_kernels.attention.reference import visible
from tuna_kernels.attention.segments import parts_of
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.tree import Group, Share, pack_groups

calls: list[dict[str, Any]] = []


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, softcap: float) -> tuple[Tensor, Tensor]:
    """([H, a, b] scores, their derivative by q·k) of one sequence; causal is aligned at the bottom right."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("ahd,bhd->hab", q, k) * scale
    slope = torch.full_like(scores, scale)
    if softcap > 0:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, slope * (1 - capped**2)
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores, slope


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, window_size_left, window_size_right)
    calls.append({"causal": causal, "pairs": 0})
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    for a, b in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores, _ = _scores(q[a].double(), k[b].double(), softmax_scale, causal, softcap)
        values = v[b].double().repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[a] = torch.einsum("hab,bhd->ahd", torch.softmax(scores, -1), values).to(q.dtype)
        lse[:, a] = torch.logsumexp(scores, -1).float()
        calls[-1]["pairs"] += scores[0].numel()
    return out, lse, torch.empty(0), torch.empty(2)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    _check(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, window_size_left, window_size_right)
    assert deterministic and softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous()
    assert dq is not None and dk is not None and dv is not None
    group = q.shape[1] // k.shape[1]
    delta = (dout.double() * out.double()).sum(-1)
    for a, b in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores, slope = _scores(q[a].double(), k[b].double(), softmax_scale, causal, softcap)
        keys, values = (x[b].double().repeat_interleave(group, 1) for x in (k, v))
        p = torch.exp(scores - softmax_lse[:, a, None].double())
        dp = torch.einsum("ahd,bhd->hab", dout[a].double(), values)
        ds = p * (dp - delta[a].T[:, :, None]) * slope
        dq[a] = torch.einsum("hab,bhd->ahd", ds, keys).to(q.dtype)
        dk[b] = torch.einsum("hab,ahd->bhd", ds, q[a].double()).unflatten(1, (-1, group)).sum(2).to(q.dtype)
        dv[b] = torch.einsum("hab,ahd->bhd", p, dout[a].double()).unflatten(1, (-1, group)).sum(2).to(q.dtype)
    return delta


def _check(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, *window: int
) -> None:
    """What the library demands: offsets int32 from 0 to all rows, no sequence empty, the longest ones named."""
    assert dropout == 0 and window == (-1, -1) and len(cu_q) == len(cu_k)
    for cu, longest, x in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == len(x) and x.is_contiguous()
        assert (cu.diff() > 0).all() and cu.diff().max() == longest


def _sequences(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    for n in range(len(cu_q) - 1):
        yield slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(flash, "DEVICE", "cpu")
    calls.clear()


def leaves_of(total: int, heads: tuple[int, int], batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    return [
        torch.randn(batch, total, h, 8, generator=generator).half().transpose(1, 2).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    ]


@given(
    forest=groups,
    share=st.sampled_from(["tree", "prompt", "none"]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    softcap=st.none() | st.floats(0.5, 20),
    batch=st.integers(1, 2),
    sink=st.none() | st.sampled_from([-4.0, 0.5, 3.0]),
)
@settings(max_examples=60, deadline=None)
def test_flash_equals_reference(
    forest: list[Group], share: Share, heads: tuple[int, int], softcap: float | None, batch: int, sink: float | None
) -> None:
    """Output, log-sum-exp and gradients of trees of any depth. The stand-in rounds every part to half precision, as the
    library does: the bounds are a few of those roundings."""
    tree = pack_groups(forest, share=share)
    leaves = leaves_of(tree.num_tokens, heads, batch)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    for qkv, backend in ((leaves, "flash"), (exact, "reference")):
        sinks = None if sink is None else torch.full((heads[0],), sink, dtype=qkv[0].dtype)
        out, lse = tree_attention(
            *qkv, tree.subtree_end, softcap=softcap, scale=0.6, sinks=sinks, return_lse=True, backend=backend
        )
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).half().to(out.dtype)
        results.append((out, lse, *torch.autograd.grad(out, qkv, upstream)))
    for name, found, true in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert found.dtype == (torch.float32 if name == "lse" else torch.float16)
        eps = torch.finfo(torch.float32 if name == "lse" else torch.float16).eps
        scale = max(1.0, float(true.detach().abs().max()))
        assert float((found - true).detach().abs().max()) <= (32 if name == "lse" else 6) * eps * scale, name


@given(groups, st.sampled_from(["tree", "prompt", "none"]))
@settings(max_examples=100, deadline=None)
def test_parts_cover_every_visible_pair_once(forest: list[Group], share: Share) -> None:
    tree = pack_groups(forest, share=share)
    count = np.zeros((tree.num_tokens, tree.num_tokens), dtype=int)
    parts = parts_of(tree.subtree_end.numpy().tobytes(), torch.device("cpu"))
    for part in parts:
        rows = torch.arange(tree.num_tokens)
        queries, keys = (rows if x is None else x for x in (part.queries, part.keys))
        for a, b in _sequences(part.query_offsets, part.key_offsets):
            for place, i in enumerate(queries[a].tolist()):
                seen = keys[b][: place + 1] if part.causal else keys[b]
                count[i, seen.numpy()] += 1
    assert np.array_equal(count, visible(tree.subtree_end, None, None, None).numpy().astype(int))
    if share != "tree":
        assert len(parts) <= 2, "a prompt and its responses are one level"


def test_work_is_prompt_and_responses_and_what_is_between() -> None:
    """One prompt of 64 and four responses of 32: one causal call over five sequences, one over the prompt."""
    tree = pack_groups([Group(prompt=[0] * 64, responses=[[i] * 32 for i in range(1, 5)])])
    tree_attention(*leaves_of(192, (2, 1)), tree.subtree_end, backend="flash")
    assert calls == [{"causal": True, "pairs": 64**2 + 4 * 32**2}, {"causal": False, "pairs": 128 * 64}]


def test_what_is_refused_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = pack_groups([Group(prompt=[1, 2], responses=[[3, 4], [3, 5], [6]])])
    q, k, v = leaves_of(tree.num_tokens, (2, 1))
    end, depth = tree.subtree_end, tree.position_ids

    def refused(message: str, *qkv: Tensor, **options: Any) -> None:
        with pytest.raises(RuntimeError, match=f"backend = 'flash' does not support.*{message}"):
            tree_attention(*(qkv or (q, k, v)), end, backend="flash", **options)

    refused("float32", *(x.float() for x in (q, k, v)))
    refused("head sizes 8 and 16", q, k, torch.cat([v, v], -1))
    refused("head sizes 5", *(x[..., :5] for x in (q, k, v)))
    refused("query_rows", query_rows=torch.arange(tree.num_tokens))
    refused("window = 3 with a sequence of 4", window=3, position_ids=depth)
    tree_attention(q, k, v, end, window=4, position_ids=depth, backend="flash")
    _, lse = tree_attention(q, k, v, end, return_lse=True, backend="flash")
    with pytest.raises(RuntimeError, match="gradient of lse"):
        lse.sum().backward()
    monkeypatch.setattr(flash, "MAX_LEVELS", 1)
    refused("2 forks on one path, more than 1")
    monkeypatch.setattr(flash, "DEVICE", "cuda")
    refused("inputs are on cpu")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(flash, "installed", lambda: False)
    refused("not installed")


def test_no_rows() -> None:
    nothing = torch.zeros(1, 2, 0, 8, dtype=torch.float16, requires_grad=True)
    out = tree_attention(nothing, nothing, nothing, torch.zeros(0, dtype=torch.int64), backend="flash")
    out.sum().backward()
    assert out.shape == (1, 2, 0, 8) and nothing.grad is not None
