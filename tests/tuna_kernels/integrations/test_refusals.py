"""What trees through transformers models refuse, and how an unknown family is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.tuna_kernels.integrations.tiny_models import (
    GROUPS,
    VOCABULARY,
    WINDOW,
    assert_close,
    bound,
    randomized,
    separate_scores,
    tiny,
)
from tuna_kernels.integrations.transformers import attention_hook, prepare_model, score_groups
from tuna_kernels.tree import Group, pack_groups

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_attention_dropout_is_refused_in_training_only() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, attention_dropout=0.1)).train()
    prepare_model(model)
    with pytest.raises(ValueError, match=r"attention dropout = 0\.1"):
        score_groups(model, pack_groups(GROUPS))
    score_groups(model.eval(), pack_groups(GROUPS))


def test_chunked_masks_are_refused() -> None:
    model = Llama4ForCausalLM(
        Llama4TextConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size_mlp=32,
            num_local_experts=2,
            attention_chunk_size=4,
        )
    )
    with pytest.raises(ValueError, match="neither causal nor causal within a sliding window"):
        prepare_model(model)


def test_bidirectional_models_are_refused() -> None:
    config = LlamaConfig(**SMALL)
    config.is_causal = False
    with pytest.raises(ValueError, match="neither causal nor causal within"):
        score_groups(LlamaForCausalLM(config), pack_groups(GROUPS))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 3,
            "long_factor": [2.0] * 3,
            "original_max_position_embeddings": 9,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_positions_beyond_the_original_length_are_refused(rope: dict[str, Any]) -> None:
    """Rotary frequencies that follow the longest sequence: right within the original length, else refused."""
    sizes = {**SMALL, "max_position_embeddings": 9}
    config = LlamaConfig(**sizes, rope_parameters={"rope_theta": 1e4, **rope})
    model = randomized(LlamaForCausalLM(config).double())
    within = [Group(prompt=[3, 4, 5], responses=[[6, 7, 8, 9, 10, 11], [6, 12]])]
    with torch.no_grad():
        assert_close(score_groups(model, pack_groups(within)).scores, separate_scores(model, within), bound("llama"))
    with pytest.raises(ValueError, match="a sequence of 11 tokens is beyond the original 9"):
        score_groups(model, pack_groups(GROUPS))


def test_positions_beyond_learned_ones_are_refused() -> None:
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="a sequence of 70 tokens exceeds the model's 64 positions"):
        score_groups(model, pack_groups([Group(prompt=[3], responses=[[4] * 69])]))


def test_wrapped_models_and_models_without_a_head_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(TypeError, match="DataParallel, not a transformers or peft model"):
        prepare_model(nn.DataParallel(model))
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        prepare_model(model.model)


def test_heads_that_are_more_than_linear_are_refused() -> None:
    class Squared(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    model = tiny("llama")
    for head, message in (
        (nn.Sequential(nn.Linear(24, VOCABULARY)), "is Sequential, not a linear layer"),
        (Squared(24, VOCABULARY), "is Squared, not a linear layer"),
    ):
        model.lm_head = head
        with pytest.raises(ValueError, match=message):
            prepare_model(model)


def test_heads_whose_weight_a_hook_makes_are_refused() -> None:
    """The loss never calls the head, so the weight would stay what it was; parametrizations are read, and served."""
    model = tiny("llama")
    torch.nn.utils.weight_norm(model.lm_head)
    with pytest.raises(ValueError, match=r"computed by a hook of its forward \(WeightNorm\)"):
        prepare_model(model)
    other = tiny("llama")
    torch.nn.utils.parametrizations.weight_norm(other.lm_head)
    assert_close(score_groups(other, pack_groups(GROUPS)).scores, separate_scores(other, GROUPS), bound("llama"))


@pytest.mark.parametrize("what", ["empty", "meta", "integers", "DTensor"])
def test_heads_that_are_not_here_are_refused(what: str) -> None:
    """What ZeRO-3 leaves behind (an empty tensor), FSDP2's shards, offloaded and quantised weights."""
    model = tiny("llama")
    weight = model.lm_head.weight.detach()
    messages = {
        "empty": "ZeRO-3 or FSDP",
        "meta": "meta device",
        "integers": "quantised",
        "DTensor": "a DTensor",
    }
    if what == "DTensor":
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        if what == "DTensor":
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            weight = torch.distributed.tensor.distribute_tensor(weight, mesh)
        else:
            weight = {"empty": weight[:0], "meta": weight.to("meta"), "integers": weight.to(torch.int8)}[what]
        model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match=messages[what]):
            prepare_model(model)
    finally:
        if what == "DTensor":
            torch.distributed.destroy_process_group()


def test_empty_trees_are_refused() -> None:
    with pytest.raises(ValueError, match="tree holds no groups"):
        score_groups(tiny("llama"), pack_groups([]))


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(IndexError):
        score_groups(tiny("llama"), pack_groups([Group(prompt=[3], responses=[[VOCABULARY]])]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "model",
    [
        lambda: OlmoForCausalLM(OlmoConfig(**SMALL)),
        lambda: Starcoder2ForCausalLM(
            Starcoder2Config(**SMALL, num_key_value_heads=2, sliding_window=WINDOW, use_bias=True)
        ),
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, sliding_window_pattern=2
            )
        ),
        lambda: MixtralForCausalLM(
            MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
        ),
    ],
    ids=["olmo", "starcoder2", "gemma3", "mixtral"],
)
def test_unknown_families_pass_the_check_when_they_are_right(model: Any, dtype: torch.dtype) -> None:
    """They are checked once, and then score as separate sequences do."""
    right = randomized(model().to(dtype))
    right.set_experts_implementation("eager")  # the default has no float64
    prepare_model(right)
    assert right.training
    if dtype == torch.float64:
        found = score_groups(right, pack_groups(GROUPS)).scores
        assert_close(found, separate_scores(right, GROUPS), bound("llama"))


class LoudConfig(LlamaConfig):
    model_type = "loud_llama"


class LoudLlama(LlamaForCausalLM):
    """Doubles its logits, of which no configuration value tells."""

    config_class = LoudConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class DeafLayer(LlamaDecoderLayer):
    """Keeps the mask from its attention."""

    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, attention_mask=None, **kwargs)


class DeafModel(LlamaModel):
    def __init__(self, config: LoudConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(DeafLayer(config, i) for i in range(config.num_hidden_layers))


class DeafLlama(LlamaForCausalLM):
    config_class = LoudConfig

    def __init__(self, config: LoudConfig) -> None:
        super().__init__(config)
        self.model = DeafModel(config)


class MixingModel(LlamaModel):
    """Adds to every hidden state the one before it, whosever that is in a packed row."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.roll(1, 1)
        return output


class MixingLlama(DeafLlama):
    def __init__(self, config: LoudConfig) -> None:
        super().__init__(config)
        self.model = MixingModel(config)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LoudLlama, "does not compute the same on a tree"),
        (DeafLlama, "did not receive the tree"),
        (MixingLlama, "does not compute the same on a tree"),
    ],
)
def test_unknown_families_are_refused_when_they_differ(kind: type, message: str) -> None:
    model = randomized(kind(LoudConfig(**SMALL)))
    with pytest.raises(ValueError, match=message):
        prepare_model(model)
    assert model.config._attn_implementation == "sdpa", "a refused model keeps the attention it came with"
    with pytest.raises(ValueError, match=message):
        score_groups(model, pack_groups(GROUPS))


@given(total=st.integers(1, 40), window=st.integers(1, 45))
def test_mask_forms_are_told_apart(total: int, window: int) -> None:
    """Causal and sliding masks are recognised with their window; chunks and prefixes of any size are not."""
    assert attention_hook._window_asked(causal_mask_function, total) is None
    seen = attention_hook._window_asked(sliding_window_causal_mask_function(window), total)
    assert seen == (window if window < total else None)
    if total > 1:
        with pytest.raises(ValueError, match="neither causal"):
            attention_hook._window_asked(bidirectional_mask_function, total)
        prefix = or_masks(causal_mask_function, lambda b, h, q, k: (q < window + 1) & (k < window + 1))
        with pytest.raises(ValueError, match="neither causal"):
            attention_hook._window_asked(prefix, total)
    if window < total:  # a chunk as long as the row is plain causal attention
        chunked = chunked_causal_mask_function(window, torch.zeros(1, dtype=torch.int64))
        if window > 1 or total > 1:
            if window == 1:  # chunks of one row are a window of one
                assert attention_hook._window_asked(chunked, total) == 1
            else:
                with pytest.raises(ValueError, match="neither causal"):
                    attention_hook._window_asked(chunked, total)
