"""How the tree reaches layers: as their mask, with sinks, by depth where a layer counts rows, or as a dense mask."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from tests.tuna_kernels.integrations.families import tiny_family
from tests.tuna_kernels.integrations.tiny_models import (
    GROUPS,
    WINDOW,
    all_gradients,
    assert_close,
    assert_same_gradients,
    bound,
    randomized,
    separate_logprobs,
    separate_scores,
    tiny,
)
from tuna_kernels.integrations.transformers import attention_hook, prepare_model, score_groups, two_phase_ranking_loss
from tuna_kernels.tree import Group, pack_groups


def long_groups(prompt: int, response: int, k: int = 3) -> list[Group]:
    draw = random.Random(0)
    return [
        Group(
            [draw.randrange(3, 48) for _ in range(prompt)],
            [[draw.randrange(3, 48) for _ in range(response)] for _ in range(k)],
        )
        for _ in range(2)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_llama4_temperature_is_by_position(dtype: torch.dtype) -> None:
    """More packed rows than the floor scale, though every sequence is shorter; and sequences beyond it."""
    for floor_scale in (32, 8):
        config = Llama4TextConfig(
            vocab_size=48, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, attention_chunk_size=64,
            floor_scale=floor_scale, attn_scale=2.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model: Any = randomized(Llama4ForCausalLM(config).double(), 0.3).to(dtype).eval()
        model.set_experts_implementation("eager")
        groups = long_groups(10, 15)
        tree = pack_groups(groups)
        assert tree.num_tokens > 64
        with torch.no_grad():
            stock = torch.cat(separate_logprobs(model, groups))
            found = score_groups(model, tree).logprobs.double()
        if dtype == torch.float64:
            assert_close(found, stock, bound("llama"))
            two_phase_ranking_loss(model, tree)
        else:
            assert (found - stock).square().mean().sqrt() < 0.2


def test_chunks_as_long_as_every_sequence_are_causal() -> None:
    """Llama 4's chunks count by position, so rows beyond a chunk do not matter."""
    model: Any = tiny_family("llama4_text")
    tree = pack_groups(long_groups(10, 30))
    assert tree.num_tokens > model.config.attention_chunk_size == 64
    score_groups(model, tree)
    with pytest.raises(ValueError, match="neither causal nor causal within"):
        score_groups(model, pack_groups(long_groups(30, 40)))


def test_ordinary_calls_of_a_model_with_sinks_keep_them() -> None:
    """SDPA has no sinks: forward and generation go to the model's own eager attention."""
    model: Any = tiny_family("gpt_oss")
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8]])
    mask = (ids != 0).long()
    before = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    prepare_model(model)
    score_groups(model, pack_groups(GROUPS))
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], before)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.add_(2)
    assert (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bloom", "mpt", "gptj", "gpt_neo", "falcon", "codegen"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_dense_masks_under_checkpointing(family: str, reentrant: bool) -> None:
    """Positions by depth also where a layer is computed again; ordinary calls are as before."""
    model: Any = tiny_family(family)
    expected = separate_scores(model, GROUPS)
    gradients = all_gradients(expected, model)
    prepare_model(model)
    if model.supports_gradient_checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = score_groups(model, pack_groups(GROUPS)).scores
    assert_close(found, expected, bound("llama"))
    model.zero_grad()
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).sum().backward()
    assert_same_gradients(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()},
        gradients,
        8 * bound("llama"),
    )
    assert_close(separate_scores(model.eval(), GROUPS), expected, 1e-12)


def test_masks_kept_by_row_bound_the_rows() -> None:
    """GPT-Neo's local layers look 64 rows back, whatever the depth."""
    model: Any = tiny_family("gpt_neo")
    with pytest.raises(ValueError, match="packed rows exceed 64"):
        score_groups(model, pack_groups(long_groups(10, 30)))
    group = long_groups(10, 18)[:1]
    assert_close(score_groups(model, pack_groups(group)).scores, separate_scores(model, group), bound("llama"))


def test_two_phases_need_the_registry() -> None:
    model: Any = prepare_model(tiny_family("bloom"))
    with pytest.raises(ValueError, match="has its own attention"):
        two_phase_ranking_loss(model, pack_groups(GROUPS))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_tiny_windows(window: int) -> None:
    model: Any = tiny("mistral")
    model.config.sliding_window = window
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    assert_close(score_groups(model, pack_groups(GROUPS)).scores, separate_scores(model, GROUPS), bound("llama"))


def test_masks_that_no_layer_uses_do_not_matter() -> None:
    tree = pack_groups(GROUPS)
    tree_pass = attention_hook.TreePass(tree.subtree_end, tree.position_ids, "auto")

    def both(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key >= 0

    with pytest.raises(ValueError, match="received the tree"), tree_pass.under_way():
        mask = attention_hook._tree_or_sdpa_mask(mask_function=both)
        assert isinstance(mask, attention_hook.TreeMask)
        assert "neither causal" in mask.refused
    assert tree_pass.longest == 11 > WINDOW
