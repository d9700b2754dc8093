"""The check of a model before its first tree looks at what it does: subclasses, hooks, rows counted, precision."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

from tests.tuna_kernels.integrations.test_refusals import SMALL
from tests.tuna_kernels.integrations.tiny_models import GROUPS, assert_close, bound, randomized, separate_scores, tiny
from tuna_kernels.integrations.transformers import (
    check,
    model_ranking_loss,
    prepare_model,
    score_groups,
    two_phase_ranking_loss,
)
from tuna_kernels.tree import pack_groups

TREE = pack_groups(GROUPS)
DIFFERS = "does not compute the same on a tree|its head is more than a linear layer"


def halving(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of half its logits."""

    def halved(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    return halved


class Scaled(LlamaForCausalLM):
    """Keeps the model type, and does more."""

    forward = halving(LlamaForCausalLM.forward)


def hook_on_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)


def hook_before_head(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def hook_on_model(model: Any) -> None:
    def halve(module: nn.Module, args: Any, out: Any) -> Any:
        out.logits = out.logits * 0.5
        return out

    model.register_forward_hook(halve)


def other_forward(model: Any) -> None:
    model.forward = MethodType(Scaled.forward, model)


def other_class(model: Any) -> None:
    model.__class__ = Scaled


CHANGES = (hook_on_head, hook_before_head, hook_on_model, other_class)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_logits_changed_by_more_than_the_head_are_refused(change: Callable[[Any], None], dtype: torch.dtype) -> None:
    """Also where the change comes after the model was prepared and used."""
    before, after = tiny("llama", dtype), tiny("llama", dtype)
    change(before)
    with pytest.raises(ValueError, match=DIFFERS):
        score_groups(before, TREE)
    score_groups(after, TREE)
    change(after)
    for use in (score_groups, model_ranking_loss, two_phase_ranking_loss):
        with pytest.raises(ValueError, match=DIFFERS):
            use(after, TREE)


def sum_of_rows(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + out.cumsum(1)


def hook_in_a_layer(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(sum_of_rows)


def other_part(model: Any) -> None:
    class Mixing(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return sum_of_rows(self, (), super().forward(x))

    model.model.layers[0].mlp.__class__ = Mixing


@pytest.mark.parametrize("change", [hook_in_a_layer, other_part])
def test_rows_mixed_within_a_layer_are_refused(change: Callable[[Any], None]) -> None:
    """Also where the change comes after the model was prepared and used, and as long as it lasts."""
    model: Any = tiny("llama")
    score_groups(model, TREE)
    change(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=DIFFERS):
            score_groups(model, TREE)


def test_a_class_that_is_given_another_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(LlamaForCausalLM):
        pass

    model: Any = tiny("llama")
    model.__class__ = Own
    score_groups(model, TREE)
    monkeypatch.setattr(Own, "forward", halving(LlamaForCausalLM.forward))
    with pytest.raises(ValueError, match=DIFFERS):
        score_groups(model, TREE)


def test_a_forward_put_on_the_object_is_refused() -> None:
    model: Any = tiny("llama")
    score_groups(model, TREE)
    stock = model.forward

    model.forward = halving(stock)
    with pytest.raises(ValueError, match=DIFFERS):
        score_groups(model, TREE)
    model.forward = stock
    score_groups(model, TREE)


def test_hooks_that_only_look_on_do_not_matter() -> None:
    model: Any = tiny("llama")
    seen: list[Any] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert_close(score_groups(model, TREE).scores, separate_scores(model, GROUPS), bound("llama"))


def test_a_model_is_checked_once_and_can_be_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[nn.Module] = []
    compare = check.compare
    monkeypatch.setattr(check, "compare", lambda model, *rest: (checks.append(model), compare(model, *rest)))
    model: Any = tiny("llama")
    for _ in range(3):
        score_groups(model, TREE)
    assert len(checks) == 1
    score_groups(copy.deepcopy(model), TREE)
    assert len(checks) == 2
    reference = weakref.ref(model)
    del model
    checks.clear()
    gc.collect()
    assert reference() is None


class ByRow(LlamaAttention):
    """A temperature by the rows of the input, from a row on that no small tree reaches."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        scale = 1 + torch.log1p(torch.floor(rows.float() / 4096))
        return super().forward((hidden_states * scale[:, None]).to(hidden_states.dtype), *args, **kwargs)


class BySum(LlamaModel):
    """The same from a running sum of the padding mask."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        scale = 1 + (mask.cumsum(-1) > 4096).float()
        embeds = self.embed_tokens(input_ids)
        kwargs["inputs_embeds"] = (embeds * scale[..., None]).to(embeds.dtype)
        return super().forward(attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_row_numbers_are_found_where_no_small_tree_shows_them(dtype: torch.dtype) -> None:
    model: Any = tiny("llama", dtype)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.__class__ = ByRow
        assert layer.self_attn.layer_idx == i
    with pytest.raises(ValueError, match="ByRow counts the rows of its input"):
        prepare_model(model)
    other: Any = tiny("llama", dtype)
    other.model.__class__ = BySum
    with pytest.raises(ValueError, match="BySum counts the rows of its input"):
        prepare_model(other)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eager_softmax_in_float32_passes_in_float64(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    config = GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)
    model = GemmaForCausalLM._from_config(config, attn_implementation="eager")
    prepare_model(randomized(model.to(dtype), 0.3))


@pytest.mark.parametrize("seed", range(6))
def test_mixtures_in_half_precision_pass(seed: int) -> None:
    """Rounding sends a token to another expert now and then: the check computes in float32."""
    torch.manual_seed(seed)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=1)
    model: Any = MixtralForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.set_experts_implementation("eager")
    weights = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    prepare_model(model)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == weights


@pytest.mark.parametrize("seed", range(3))
def test_large_half_precision_models_are_checked_as_they_are(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy in float32: still the right model passes, and halved logits do not."""
    monkeypatch.setattr(check, "IN_FLOAT32", 0)
    torch.manual_seed(seed)
    model = randomized(LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).to(torch.bfloat16))
    prepare_model(model)
    hook_on_head(model)
    with pytest.raises(ValueError, match="does not compute the same"):
        prepare_model(model)


def test_autocast_around_the_call_is_not_taken_for_a_difference() -> None:
    model = tiny("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        score_groups(model, TREE)


def test_neftune_is_refused_in_training() -> None:
    """Its noise would be that of the packed row, and drawn once for all candidates."""
    model: Any = tiny("llama")
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    for use in (score_groups, model_ranking_loss, two_phase_ranking_loss):
        with pytest.raises(ValueError, match="NEFTune is on"):
            use(model.train(), TREE)
    assert_close(score_groups(model.eval(), TREE).scores, separate_scores(model, GROUPS), bound("llama"))
    handle.remove()
    score_groups(model.train(), TREE)
