"""Trees through peft models: LoRA in the trunk and on the head, a head trained whole, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from tests.tuna_kernels.integrations.tiny_models import (
    GROUPS,
    all_gradients,
    assert_close,
    assert_same_gradients,
    bound,
    randomized,
    separate_scores,
    tiny,
)
from tuna_kernels.integrations.transformers import model_ranking_loss, prepare_model, score_groups
from tuna_kernels.losses import ranking_loss
from tuna_kernels.tree import pack_groups


def _with_lora(family: str = "llama", seed: int = 3, **settings: Any) -> nn.Module:
    """A tiny model with adapters whose B is not zero, so that they change the scores."""
    settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, **settings}
    model = get_peft_model(tiny(family), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double().train()


TRUNK = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "trunk": {"target_modules": TRUNK},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": [*TRUNK, "lm_head"]},
    "rank-stabilised": {"target_modules": [*TRUNK, "lm_head"], "use_rslora": True},
    "head saved whole": {"target_modules": TRUNK, "modules_to_save": ["lm_head"]},
    "embedding too": {
        "target_modules": TRUNK,
        "modules_to_save": ["lm_head", "embed_tokens"],
    },
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters(kind: str, checkpointing: bool) -> None:
    """LoRA in the trunk, on the head, on both, and a head trained whole."""
    model = _with_lora(**ADAPTERS[kind])
    expected = separate_scores(model, GROUPS)
    with model.disable_adapter():
        assert (separate_scores(model, GROUPS) - expected).abs().max() > 1e-2
    gradients = all_gradients(expected, model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert prepare_model(model) is model
    found = score_groups(model, pack_groups(GROUPS)).scores
    assert_close(found, expected, bound("llama"))
    assert_same_gradients(all_gradients(found, model), gradients, bound("llama"))


def test_scaled_and_capped_heads_with_adapters() -> None:
    """LoRA stands inside scale and softcap."""
    for family in ("granite", "gemma2"):
        model = _with_lora(family, target_modules=["lm_head"])
        expected = separate_scores(model, GROUPS)
        found = score_groups(model, pack_groups(GROUPS)).scores
        assert_close(found, expected, bound(family))
        assert_same_gradients(all_gradients(found, model), all_gradients(expected, model), bound(family))


def test_ranking_loss_trains_adapters_alone() -> None:
    model = _with_lora(**ADAPTERS["both"])
    tree = pack_groups(GROUPS)
    scores = separate_scores(model, GROUPS)
    expected = ranking_loss(scores, tree.ranks, tree.group_offsets)
    output = model_ranking_loss(model, tree, mle_weight=0.0)
    assert_same_gradients(all_gradients(output.loss, model), all_gradients(expected, model), bound("llama"))


@pytest.mark.parametrize("kind", ["both", "head saved whole"])
def test_disabled_and_merged_adapters(kind: str) -> None:
    model = _with_lora(**ADAPTERS[kind])
    tree = pack_groups(GROUPS)
    with torch.no_grad():
        with model.disable_adapter():
            assert_close(score_groups(model, tree).scores, separate_scores(model, GROUPS), bound("llama"))
        with_adapter = score_groups(model, tree).scores
        model.merge_adapter()
        assert_close(score_groups(model, tree).scores, with_adapter, bound("llama"))
        if kind == "both":
            model.base_model.disable_adapter_layers()
            with pytest.raises(ValueError, match="both merged into the head and disabled"):
                score_groups(model, tree)


def test_one_of_several_adapters_counts() -> None:
    model = _with_lora(**ADAPTERS["both"])
    model.add_adapter("other", LoraConfig(target_modules=["lm_head"], r=2))
    randomized(model)
    model.double()
    tree = pack_groups(GROUPS)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert_close(score_groups(model, tree).scores, separate_scores(model, GROUPS), bound("llama"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 LoRA adapters are active on the head"):
        score_groups(model, tree)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "not plain LoRA"),
        ({"lora_dropout": 0.1}, "lora_dropout = 0.1 on the head"),
        ({"lora_bias": True}, "LoRA bias"),
    ],
)
def test_other_adapters_on_the_head_are_refused(settings: dict[str, Any], message: str) -> None:
    model = _with_lora(target_modules=["lm_head"], **settings)
    with pytest.raises(ValueError, match=message):
        prepare_model(model)


def test_dropout_of_a_head_adapter_is_fine_in_evaluation() -> None:
    model = _with_lora(target_modules=["lm_head"], lora_dropout=0.5).eval()
    with torch.no_grad():
        assert_close(score_groups(model, pack_groups(GROUPS)).scores, separate_scores(model, GROUPS), bound("llama"))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(config: type) -> None:
    model = get_peft_model(tiny("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="virtual tokens"):
        prepare_model(model)
