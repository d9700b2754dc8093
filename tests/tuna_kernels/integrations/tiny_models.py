"""Tiny random causal LMs of the families that must agree with separate sequences, and the reference to compare
with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tuna_kernels.tree import Group

VOCABULARY = 48
WINDOW = 4
"""Shorter than the sequences of `GROUPS`, and than the rows between a branch and its prompt."""

GROUPS = [
    Group(
        prompt=[3, 4, 5, 6, 7],
        responses=[[8, 9, 10, 11, 12, 13], [8, 9, 20], [21, 22, 23, 24], [8, 9]],
        ranks=[1, 0, 2, 3],
    ),
    Group(prompt=[30, 31], responses=[[32, 33, 34, 35, 36, 37, 38], [39]], ranks=[0, 1]),
    Group(prompt=[3, 4, 5], responses=[[40, 41, 42]]),
]

_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_TOKENS,
}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "llama-tied-bias": lambda: LlamaForCausalLM(
        LlamaConfig(**_COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, sliding_window=WINDOW)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_COMMON)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_COMMON,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            final_logit_softcapping=3.0,
            attn_implementation="eager",  # stock SDPA leaves the softcap out in some versions of transformers
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            ffn_dim=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            dropout=0.0,
            **_TOKENS,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=24,
            n_layer=3,
            n_head=4,
            n_positions=64,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            scale_attn_by_inverse_layer_idx=True,
            **_TOKENS,
        )
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_COMMON, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**_COMMON, logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.7)
    ),
}

IN_DOUBLE = ("opt", "gpt2")
"""Families whose every operation follows the model's dtype. The others take norms (and Gemma-2 its own
softmax) in float32 whatever the model's dtype, so float64 models of theirs agree to float32 rounding only."""


def tiny(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    return randomized(FAMILIES[family]().to(dtype)).train()


def randomized(model: nn.Module, spread: float = 0.3) -> nn.Module:
    """The model with all parameters drawn anew."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def bound(family: str) -> float:
    """Relative error allowed: 64 float32 rounding errors, or a million float64 ones."""
    return 2.0**20 * torch.finfo(torch.float64).eps if family in IN_DOUBLE else 64 * torch.finfo(torch.float32).eps


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    """Relative to the largest value."""
    error = (found - expected).abs().max().item()
    assert error <= relative * expected.abs().max().item(), f"{error} > {relative} relative"


def separate_logprobs(model: nn.Module, groups: list[Group]) -> list[Tensor]:
    """Per candidate the log-probabilities [|y|] of its tokens, each sequence alone through the stock
    forward."""
    device = next(model.parameters()).device
    found = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]], device=device)
            logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits.to(torch.float64), -1)
            found.append(logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1))
    return found


def separate_scores(model: nn.Module, groups: list[Group], length_penalty: float = 1.0) -> Tensor:
    """[C]: the reference's scores."""
    return torch.stack([x.sum() / len(x) ** length_penalty for x in separate_logprobs(model, groups)])


def all_gradients(outputs: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a fixed random sum of the outputs for every trainable parameter, by name."""
    upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((outputs * upstream).sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named.items(), grads, strict=True)
    }


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Each parameter's gradient, relative to its own size (or a millionth of the largest, where it is
    noise)."""
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    assert largest > 0
    for name, grad in expected.items():
        size = max(grad.abs().max().item(), 1e-6 * largest)
        error = (found[name] - grad).abs().max().item()
        assert error <= relative * size, f"{name}: {error} > {relative} * {size}"
