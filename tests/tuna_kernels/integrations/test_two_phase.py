"""The two-phase schedule: loss, scores and every gradient equal those of the one-pass loss."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from tests.tuna_kernels.integrations.tiny_models import (
    FAMILIES,
    GROUPS,
    VOCABULARY,
    assert_close,
    assert_same_gradients,
    bound,
    tiny,
)
from tuna_kernels.integrations.transformers import (
    model_ranking_loss,
    prepare_model,
    shared_keys,
    two_phase_ranking_loss,
)
from tuna_kernels.integrations.transformers.two_phase import loss as two_phase
from tuna_kernels.integrations.transformers.two_phase.passes import TreeGroups
from tuna_kernels.tree import Group, Share, pack_groups


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, and taken off the parameters."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return {name: torch.zeros(()) if grad is None else grad for name, grad in found.items()}


def prepared(family: str) -> nn.Module:
    """In training mode, or not where the family draws for layer drop even at a rate of 0 (OPT in some versions)."""
    model = prepare_model(tiny(family))
    before = torch.get_rng_state()
    model(input_ids=torch.tensor([[3]]))
    return model if torch.equal(torch.get_rng_state(), before) else model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_pass(family: str) -> None:
    """Every family, one to four candidates a pass, with and without activation checkpointing."""
    model = prepared(family)
    tree = pack_groups(GROUPS)
    for preset in ("paper", "released"):
        expected = model_ranking_loss(model, tree, preset=preset, margin=0.4)
        expected.loss.backward()
        wanted = gradients(model)
        for size in (1, 2, 4):
            found = two_phase_ranking_loss(model, tree, preset=preset, margin=0.4, candidates_per_pass=size)
            assert_close(found.loss, expected.loss, bound(family))
            assert_close(found.scores, expected.scores, bound(family))
            assert torch.equal(found.active, expected.active)
            assert_same_gradients(gradients(model), wanted, bound(family))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    two_phase_ranking_loss(model, tree, preset="released", margin=0.4)
    assert_same_gradients(gradients(model), wanted, bound(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_may_be_scored_apart(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one on top of the kept prompt, where the tree has more rows than may be scored at once."""
    model = prepared(family)
    tree = pack_groups(GROUPS)
    expected = two_phase_ranking_loss(model, tree, margin=0.4)
    wanted = gradients(model)
    monkeypatch.setattr(two_phase, "SCORING_ROWS", 0)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    with model.base_model.register_forward_pre_hook(count):
        prepare_model(model)  # checks the model once more, since it has a hook now
        forwards = 0
        found = two_phase_ranking_loss(model, tree, margin=0.4, most_passes=lambda passes: passes + 2)
    alone = tree.num_candidates + sum(len(group.prompt) > 1 for group in GROUPS)
    assert forwards == alone + 2 + found.passes
    assert_close(found.logprobs, expected.logprobs, bound(family))
    assert_same_gradients(gradients(model), wanted, bound(family))


def both_in_float32(family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of one pass and of two phases."""
    model = prepare_model(tiny(family, torch.float32))
    tree = pack_groups(GROUPS)
    model_ranking_loss(model, tree, margin=0.4).loss.backward()
    expected = gradients(model)
    two_phase_ranking_loss(model, tree, margin=0.4)
    return expected, gradients(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_equals_one_pass_to_a_millionth_in_float32(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-6 of the largest gradient, by the code that is the same on every processor."""
    monkeypatch.setenv("TUNA_KERNELS_CPU_ISA", "generic")
    expected, found = both_in_float32(family)
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in found.items():
        assert (grad - expected[name]).abs().max().item() <= 1e-6 * largest, name


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_equals_one_pass_in_float32_as_models_are_trained(family: str) -> None:
    """By this processor's code: 1e-6 in norm, entries 2e-6 of the largest, as far as either way is from float64."""
    wanted, found = (torch.cat([g.flatten() for _, g in sorted(gs.items())]) for gs in both_in_float32(family))
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


tokens = st.integers(3, VOCABULARY - 1)
responses = st.lists(st.integers(3, 5), min_size=1, max_size=6)  # few tokens: many common beginnings
groups = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=5),
        st.lists(
            st.tuples(st.lists(st.integers(3, 5), min_size=1, max_size=6), st.integers(0, 2)), min_size=1, max_size=5
        ),
    ).map(lambda g: Group(g[0], [y for y, _ in g[1]], ranks=[r for _, r in g[1]])),
    min_size=1,
    max_size=3,
)
GPT2 = prepare_model(tiny("gpt2"))


@settings(deadline=None, max_examples=25)
@given(groups, st.sampled_from(["tree", "prompt", "none"]), st.integers(1, 3), st.booleans(), st.integers(0, 4))
def test_equals_one_pass_on_any_groups(
    drawn: list[Group], share: Share, size: int, skip: bool, scoring_rows: int
) -> None:
    """Prompts of one token, equal candidates, one candidate within another, any packing; in float64."""
    tree = pack_groups(drawn, share=share)
    GPT2.zero_grad(set_to_none=True)
    expected = model_ranking_loss(GPT2, tree, margin=0.05, mle_weight=0.5)
    expected.loss.backward()
    wanted = gradients(GPT2)
    with mock.patch.object(two_phase, "SCORING_ROWS", scoring_rows):
        found = two_phase_ranking_loss(
            GPT2, tree, margin=0.05, mle_weight=0.5, candidates_per_pass=size, skip_inactive=skip
        )
    assert_close(found.loss, expected.loss, bound("gpt2"))
    assert_same_gradients(gradients(GPT2), wanted, bound("gpt2"))


@pytest.mark.parametrize("share", ["tree", "prompt", "none"])
def test_a_tree_gives_its_groups_back(share: Share) -> None:
    found = TreeGroups(pack_groups(GROUPS, share=share))
    for g, group in enumerate(GROUPS):
        assert found.prompt(g).tolist() == list(group.prompt)
        assert [found.response(c).tolist() for c in found.candidates(g)] == [list(y) for y in group.responses]


def test_adapters_on_trunk_and_head() -> None:
    """Layers below the first adapter need no gradient; their keys are no leaves."""
    from peft import LoraConfig, get_peft_model

    tree = pack_groups(GROUPS)
    for targets, layers in ((["v_proj", "lm_head"], None), (["k_proj", "down_proj"], [1])):
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=targets, layers_to_transform=layers, init_lora_weights=False)
        model = get_peft_model(tiny("llama"), config)
        model_ranking_loss(model, tree, margin=0.4).loss.backward()
        expected = gradients(model)
        two_phase_ranking_loss(model, tree, margin=0.4, candidates_per_pass=2)
        assert_same_gradients(gradients(model), expected, bound("llama"))


def test_inactive_candidates_are_left_out_and_counted() -> None:
    """A margin of 0 and no likelihood: only pairs in the wrong order have a gradient."""
    model = prepare_model(tiny("gpt2"))
    tree = pack_groups(GROUPS)
    settings_: dict[str, Any] = {"margin": 0.0, "mle_weight": 0.0}
    expected = model_ranking_loss(model, tree, **settings_)
    expected.loss.backward()
    wanted = gradients(model)
    inactive = int((~expected.active).sum())
    assert 0 < inactive < tree.num_candidates
    found = two_phase_ranking_loss(model, tree, **settings_)
    assert found.skipped == inactive
    assert_same_gradients(gradients(model), wanted, bound("gpt2"))
    everything = two_phase_ranking_loss(model, tree, skip_inactive=False, **settings_)
    assert everything.skipped == 0 and everything.passes > found.passes
    assert_same_gradients(gradients(model), wanted, bound("gpt2"))
    assert two_phase_ranking_loss(model, tree, preset="released").skipped == 0


def test_the_callers_backward() -> None:
    """A constant factor, as of loss scaling, comes out once; the last pass is named; more passes change nothing."""
    model = prepare_model(tiny("gpt2"))
    tree = pack_groups(GROUPS)
    two_phase_ranking_loss(model, tree, margin=0.4)
    expected = {name: 512 * grad for name, grad in gradients(model).items()}
    calls: list[bool] = []

    def backward(loss: Tensor, last: bool) -> None:
        calls.append(last)
        (loss * 1024).backward()

    found = two_phase_ranking_loss(
        model, tree, margin=0.4, scale=0.5, backward=backward, most_passes=lambda passes: passes + 3
    )
    assert calls == [False] * (found.passes - 1) + [True]
    assert_same_gradients(gradients(model), expected, bound("gpt2"))
    nothing = two_phase_ranking_loss(model, tree, margin=0.4, scale=0.0)
    assert nothing.passes == 1 and nothing.loss == found.loss
    assert all(grad.abs().max() == 0 for grad in gradients(model).values())


def test_gradients_of_shared_keys_are_summed_in_float32() -> None:
    """256 additions of 1 to a sum that begins at 256: bfloat16 would stay there."""
    keys = shared_keys.PromptKeys()
    layer, one = nn.Identity(), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    keys.add_gradient(layer, 0, 256 * one)
    for _ in range(256):
        keys.add_gradient(layer, 0, one)
    total = keys.sums[layer][0]
    assert total is not None and total.dtype == torch.float32 and total.item() == 512


def test_what_the_phases_would_compute_apart_is_refused() -> None:
    tree = pack_groups(GROUPS)
    gpt2 = tiny("gpt2")
    config = copy.deepcopy(gpt2.config)
    config.resid_pdrop = 0.1
    with pytest.raises(ValueError, match=r"dropout = 0\.1 in '.*resid_dropout'"):
        two_phase_ranking_loss(GPT2LMHeadModel(config).train(), tree)
    two_phase_ranking_loss(GPT2LMHeadModel(config).eval(), tree)
    opt = tiny("opt")
    for layer in opt.model.decoder.layers:
        layer.dropout = 0.1  # a functional one, which no module shows
    with pytest.raises(ValueError, match="draws random numbers"):
        two_phase_ranking_loss(opt, tree)
    llama = prepare_model(tiny("llama"))
    llama.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant"):
        two_phase_ranking_loss(llama, tree)
    assert all(p.grad is None for model in (opt, llama) for p in model.parameters())


def test_bad_arguments_are_refused() -> None:
    model, tree = tiny("gpt2"), pack_groups(GROUPS)
    with pytest.raises(ValueError, match="candidates_per_pass = 0"):
        two_phase_ranking_loss(model, tree, candidates_per_pass=0)
    with pytest.raises(ValueError, match="preset = 'other'"):
        two_phase_ranking_loss(model, tree, preset="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no groups"):
        two_phase_ranking_loss(model, pack_groups([]))
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are disabled"):
        two_phase_ranking_loss(model, tree)
