"""linear_ranking_loss: equals the reference from full logits, however its groups are cut into blocks."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna_kernels import Group, LossCounts, available_backends, linear_ranking_loss, pack_groups
from tuna_kernels.head import tiled

NATIVE = pytest.param(
    "cpu", marks=pytest.mark.skipif(bool(available_backends()["cpu"]), reason=available_backends()["cpu"])
)
BACKENDS = ["torch", NATIVE]
PRESETS: tuple[Literal["paper"], Literal["released"]] = ("paper", "released")
VOCABULARY, WIDTH = 301, 16


def make_groups(count: int = 5, seed: int = 3) -> list[Group]:
    """Ragged groups of 1 to 5 candidates, with ties and common first tokens."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (n,), generator=g).tolist()

    groups = []
    for i in range(count):
        k = (1, 2, 3, 5, 4)[i % 5]
        start = tokens(1)
        responses = [start + tokens(1 + 3 * j) for j in range(k)]
        scores = torch.randint(0, 4, (k,), generator=g).double().tolist()
        groups.append(Group(tokens(4), responses, scores=scores))
    return groups


def evaluate(
    groups: list[Group],
    backend: str,
    dtype: torch.dtype,
    *,
    share: Literal["tree", "prompt", "none"] = "tree",
    frozen: bool = False,
    lora: bool = False,
    upstream: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    tree = pack_groups(groups, share=share)
    g = torch.Generator().manual_seed(1)
    table = torch.randn(VOCABULARY, WIDTH, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=g).to(dtype).requires_grad_(not frozen)
    bias = torch.randn(VOCABULARY, generator=g).to(dtype).requires_grad_(not frozen)
    a, b = torch.randn(3, WIDTH, generator=g).to(dtype), torch.randn(VOCABULARY, 3, generator=g).to(dtype)
    adapters = [t.requires_grad_() for t in (a, b)] if lora else []
    hidden = table[tree.input_ids] * (1 + tree.position_ids.unsqueeze(1).to(dtype) / 7)
    out = linear_ranking_loss(
        hidden,
        weight,
        tree,
        bias=bias,
        lora=(a, b, 0.5) if lora else None,
        backend=backend,
        **options,
    )
    (out.loss * upstream).backward()
    leaves = {"table": table, "weight": weight, "bias": bias, **dict(zip("ab", adapters, strict=False))}
    values = {"loss": out.loss.detach(), "ranking": out.ranking, "mle": out.mle}
    values |= {"scores": out.scores, "logprobs": out.logprobs, "active": out.active.to(dtype)}
    return values | {f"d {name}": x.grad for name, x in leaves.items() if x.grad is not None}


ONE_GROUP = VOCABULARY * 4 * 60
OPTIONS: list[dict[str, Any]] = [
    {},
    {"frozen": True},
    {"lora": True},
    {"logit_scale": 0.5, "softcap": 3.0},
    {"upstream": 0.25},
    {"margin": 0.5, "length_penalty": 1.3, "mle_weight": 0.2},
    {"mle_weight": 0.0},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", [0, ONE_GROUP, None])
def test_equals_the_reference(backend: str, preset: str, options: dict[str, Any], budget: int | None) -> None:
    groups = make_groups()
    truth = evaluate(groups, "reference", torch.float64, preset=preset, **options)
    reference = evaluate(groups, "reference", torch.float32, preset=preset, **options)
    got = evaluate(groups, backend, torch.float32, preset=preset, logits_budget=budget, **options)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_as_good_as_reference(got[name], reference[name], truth[name], name)


@pytest.mark.parametrize("preset", PRESETS)
def test_float64_is_exact_to_rounding(preset: str) -> None:
    truth = evaluate(make_groups(), "reference", torch.float64, preset=preset)
    for budget in (0, 2 * ONE_GROUP, None):
        got = evaluate(make_groups(), "torch", torch.float64, preset=preset, logits_budget=budget)
        for name in truth:
            torch.testing.assert_close(got[name], truth[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("share", ["prompt", "none"])
def test_sharing_changes_nothing(backend: str, preset: str, share: Any) -> None:
    """The hidden states here depend on token and depth alone, as a trunk's would on the whole prefix."""
    shared = evaluate(make_groups(), backend, torch.float32, preset=preset)
    apart = evaluate(make_groups(), backend, torch.float32, preset=preset, share=share)
    for name in shared:
        torch.testing.assert_close(apart[name], shared[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=15, deadline=None)
@given(cut=st.integers(1, 7), seed=st.integers(0, 50))
def test_micro_batches_with_the_counts_of_the_step_add_up(backend: str, preset: Any, cut: int, seed: int) -> None:
    groups = make_groups(8, seed)
    counts = pack_groups(groups).loss_counts()
    whole = evaluate(groups, backend, torch.float32, preset=preset)
    parts = [
        evaluate(part, backend, torch.float32, preset=preset, counts=counts) for part in (groups[:cut], groups[cut:])
    ]
    for name in ("loss", "ranking", "mle", "d table", "d weight", "d bias"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [0, None])
def test_a_second_backward_gives_the_bits_of_the_first(backend: str, budget: int | None) -> None:
    """Gradients made in the forward are handed over once; the next backward makes them again the same way."""
    tree = pack_groups(make_groups())
    hidden = torch.randn(tree.num_tokens, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    loss = linear_ranking_loss(hidden, weight, tree, logits_budget=budget, backend=backend).loss
    first = torch.autograd.grad(loss * 2, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    third = torch.autograd.grad(loss * 2, (hidden, weight), retain_graph=True)
    for before, now, other, again in zip(kept, first, second, third, strict=True):
        assert torch.equal(before, now), "the first result was changed by the second backward"
        torch.testing.assert_close(other, now * 1.5, rtol=1e-4, atol=1e-6)
        assert torch.equal(again, now)


@pytest.mark.parametrize("budget", [0, ONE_GROUP, None])
def test_gradcheck(budget: int | None) -> None:
    """It runs two backwards of one graph and wants the same bits (``nondet_tol=0``)."""
    tree = pack_groups([Group([1, 2], [[3, 4], [3, 5, 6], [7]], ranks=[0, 1, 2])])
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 5, generator=g).double().requires_grad_() for n in (tree.num_tokens, 11))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_ranking_loss(h, w, tree, logits_budget=budget, backend="torch").loss

    assert torch.autograd.gradcheck(loss, (h, w))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mle_weight", [1.0, 0.0])
def test_a_token_without_probability(backend: str, preset: Any, mle_weight: float) -> None:
    """In a losing candidate it costs that one its score and nothing else; gradients are finite whatever the loss is."""
    tree = pack_groups([Group([0], [[1, 2], [3], [4]], ranks=[0, 1, 2])])
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(tree.num_tokens, 8, generator=g), torch.randn(9, 8, generator=g)
    for token, is_best in ((4, False), (2, True)):
        h, bias = hidden.clone().requires_grad_(), torch.zeros(9)
        bias[token] = -torch.inf
        out = linear_ranking_loss(h, weight, tree, bias=bias, preset=preset, mle_weight=mle_weight, backend=backend)
        out.loss.backward()
        assert out.scores.isinf().tolist() == [is_best, False, not is_best]
        assert out.ranking.isfinite().item() is not is_best
        assert out.mle.isfinite().item() is (preset == "paper" and not is_best)
        expected = out.ranking + (mle_weight * out.mle if mle_weight else 0)
        torch.testing.assert_close(out.loss.detach(), expected)
        assert h.grad is not None and h.grad.isfinite().all()
        assert h.grad.any() or not mle_weight


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gradients_survive_loss_scaling(backend: str) -> None:
    """A gradient below float16's smallest number is there once the loss is scaled up."""
    tree = pack_groups(make_groups())
    hidden = (torch.randn(tree.num_tokens, WIDTH)).half().requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).half().requires_grad_()

    def gradient(scale: float, dtype: torch.dtype) -> Tensor:
        h, w = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
        out = linear_ranking_loss(h, w, tree, backend=backend if dtype == torch.float16 else "reference")
        (out.loss * 1e-8 * scale).backward()
        assert h.grad is not None
        return h.grad

    assert not gradient(1.0, torch.float16).any()
    exact = gradient(2.0**20, torch.float64)
    scaled = gradient(2.0**20, torch.float16).double()
    assert (scaled - exact).abs().max() < 2e-3 * exact.abs().max() + 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_block_stays_within_its_budget(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []
    inner = tiled.forward

    def spy(*args: Any, block: Tensor | None = None, **options: Any) -> Any:
        blocks.append(0 if block is None else block.numel() * block.element_size())
        return inner(*args, block=block, **options)

    monkeypatch.setattr(tiled, "forward", spy)
    evaluate(make_groups(), backend, torch.float32, logits_budget=ONE_GROUP)
    assert len(blocks) > 1 and 0 < max(blocks) <= ONE_GROUP
    blocks.clear()
    evaluate(make_groups(), backend, torch.float32, logits_budget=0)
    assert max(blocks) == 0


def test_active_says_which_candidates_have_a_gradient() -> None:
    """Well separated scores close every hinge: only the best candidate, through the MLE term, is active."""
    tree = pack_groups([Group([0], [[1], [2], [3]], ranks=[1, 0, 2])])
    hidden, weight = torch.ones(tree.num_tokens, 1), torch.tensor([[0.0], [2.0], [4.0], [0.0]])
    assert linear_ranking_loss(hidden, weight, tree).active.tolist() == [False, True, False]
    assert linear_ranking_loss(hidden, weight, tree, preset="released").active.all()
    assert not linear_ranking_loss(hidden, weight, tree, mle_weight=0.0).active.any()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_one_candidate_is_supervised_fine_tuning(backend: str) -> None:
    tree = pack_groups([Group([0, 1], [[2, 3]])])
    hidden, weight = torch.randn(tree.num_tokens, 4), torch.randn(9, 4)
    out = linear_ranking_loss(hidden, weight, tree, backend=backend)
    expected = torch.nn.functional.cross_entropy(hidden[1:3] @ weight.t(), torch.tensor([2, 3]))
    torch.testing.assert_close(out.loss, expected)
    assert out.ranking == 0


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_no_groups_is_a_connected_zero(backend: str) -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    for preset in PRESETS:
        loss = linear_ranking_loss(hidden, weight, pack_groups([]), preset=preset, backend=backend).loss
        loss.backward()
        assert loss == 0 and weight.grad is not None and not weight.grad.any()


def test_no_grad_makes_no_gradients() -> None:
    tree = pack_groups(make_groups())
    hidden, weight = torch.randn(tree.num_tokens, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH)
    with torch.no_grad():
        out = linear_ranking_loss(hidden, weight, tree)
    assert not out.loss.requires_grad


def test_bad_input_is_named() -> None:
    tree = pack_groups(make_groups())
    hidden, weight = torch.randn(tree.num_tokens, WIDTH), torch.randn(VOCABULARY, WIDTH)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"kind": "simpo"}, ValueError, "simpo"),
        ({"preset": "mine"}, ValueError, "mine"),
        ({"logits_budget": -1}, ValueError, "logits_budget = -1"),
        ({"preset": "released", "counts": LossCounts(5, (1,), 9)}, ValueError, "pairs_by_lag"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            linear_ranking_loss(hidden, weight, tree, **options)
    with pytest.raises(ValueError, match=f"{tree.num_tokens} tokens"):
        linear_ranking_loss(hidden[1:], weight, tree)
    with pytest.raises(IndexError, match="vocabulary of 10"):
        linear_ranking_loss(hidden, weight[:10], tree)
