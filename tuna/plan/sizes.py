"""Model configurations by name, from a file, or from sizes; no weights are read or created."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tuna.models.hub import hub_model
from tuna.models.loading import SMOLLM2, TINY

__all__ = ["SIZES", "at_depth", "explicit_config", "layer_period", "model_config"]

# From the published config.json of each model.
SIZES: dict[str, dict[str, Any]] = {
    "llama-7b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
                 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "llama-13b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
                  "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    "llama3-8b": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                  "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "mistral-7b": {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
                   "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "sliding_window": None},
    "qwen2.5-7b": {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                   "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen2.5-1.5b": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
                     "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                     "tie_word_embeddings": True},
    SMOLLM2: {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
              "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
              "tie_word_embeddings": True},
    TINY: {"model_type": "llama", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 160,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip

# Names of the models on the hub, without owner and kind of tuning.
HUB = {
    **{name: name for name in SIZES},
    "llama-2-7b": "llama-7b",
    "llama-2-13b": "llama-13b",
    "llama-3-8b": "llama3-8b",
    "llama-3.1-8b": "llama3-8b",
}

_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def model_config(name_or_path: str | os.PathLike[str]) -> PretrainedConfig:
    """The transformers configuration of a built-in size, a name on the hub, a model folder or a `config.json`.

    Raises:
        FileNotFoundError: neither a built-in size, nor a path, nor a model on the hub.
        ValueError: not a configuration that transformers knows.
    """
    name = os.fspath(name_or_path)
    if name.lower() in SIZES:
        return _for_model(SIZES[name.lower()])
    path = Path(name).expanduser()
    place = str(path)
    if not path.exists():
        if (size := _size_of(name)) is not None:
            return _for_model(SIZES[size])
        if "/" not in name:
            raise FileNotFoundError(f"model = {name!r} is neither a path nor one of {', '.join(SIZES)}")
        place = hub_model(name, tuple(SIZES))
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model = {name!r} has no configuration that transformers knows: {error}") from error
    return found


def _size_of(name: str) -> str | None:
    """The built-in size of a name on the hub: owner and kind of tuning do not change the sizes."""
    model = name.lower().rpartition("/")[2].removeprefix("meta-")
    return HUB.get(re.sub(r"(-(hf|chat|instruct|base|it|v0\.[12]))+$", "", model))


def explicit_config(**sizes: int | None) -> PretrainedConfig:
    """A Llama configuration with the given sizes, named as in `transformers.LlamaConfig`.

    Raises:
        ValueError: a size is missing or below 1, or heads do not divide the width.
    """
    missing = [name for name in _NEEDED if sizes.get(name) is None]
    if missing:
        raise ValueError(f"a model given by its sizes also needs {', '.join(missing)}")
    given = {name: value for name, value in sizes.items() if value is not None}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if given["hidden_size"] % given["num_attention_heads"]:
        raise ValueError(
            f"hidden_size = {given['hidden_size']} is not a multiple of num_attention_heads = "
            f"{given['num_attention_heads']}"
        )
    return _for_model({"model_type": "llama", **given})


def layer_period(config: PretrainedConfig) -> int:
    """Period of the layer types (full, sliding attention) in number of layers; 1 if all are alike."""
    kinds = getattr(config.get_text_config(), "layer_types", None)
    if not kinds:
        return 1
    return next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))


def at_depth(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with another number of layers."""
    changed = copy.deepcopy(config)
    text: Any = changed.get_text_config()
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        period = layer_period(config)
        text.layer_types = [kinds[i % period] for i in range(layers)]
    return changed


def _for_model(fields: dict[str, Any]) -> PretrainedConfig:
    # No position limit: planning is for any length, also beyond the model's context.
    return AutoConfig.for_model(**{"max_position_embeddings": 1 << 20, **fields})
