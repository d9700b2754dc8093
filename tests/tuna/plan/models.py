"""Three small models of different shape, the groups they are measured on, and a real step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tuna.plan.settings import StepSettings
from tuna.plan.steps import make_trainable
from tuna.plan.workload import Workload

CONFIGS: dict[str, dict[str, Any]] = {
    "wide vocabulary": {"model_type": "llama", "vocab_size": 12000, "hidden_size": 96, "intermediate_size": 256,
                        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4},
    "deep, tied, grouped": {"model_type": "llama", "vocab_size": 3000, "hidden_size": 128, "intermediate_size": 320,
                            "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2,
                            "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "vocab_size": 5000, "hidden_size": 192, "intermediate_size": 640,
              "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 3},
}  # fmt: skip
WORKLOAD = Workload(responses=4, prompt_tokens=90, response_tokens=60)


def config_of(name: str) -> PretrainedConfig:
    return AutoConfig.for_model(**CONFIGS[name])


def real_model(name: str, settings: StepSettings) -> nn.Module:
    """With gradients in place, as before a second micro-batch."""
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = make_trainable(auto.from_config(config_of(name), attn_implementation="sdpa"), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return model
