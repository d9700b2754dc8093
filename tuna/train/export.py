"""From a checkpoint, or a model under ZeRO-3, to a folder of safetensors that plain transformers loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tuna.data.templates import end_generation_at, save_template, saved_template
from tuna.models.adapters import merged
from tuna.models.integrity import MARKER, CheckpointError
from tuna.models.loading import load_model
from tuna.train import checkpoints
from tuna.train.outputs import is_in
from tuna.train.trust import loading, reading

ADAPTER = "adapter_config.json"


def export(
    source: Path, output: Path, *, model: str | None = None, dtype: torch.dtype | None = None, trust: bool = False
) -> Path:
    """Write the model of a checkpoint as a plain model: ZeRO shards joined, an adapter merged.

    Args:
        source: a checkpoint, an adapter, or the folder of a run (for its last complete checkpoint).
        output: a folder that does not exist yet.
        model: the base model of an adapter; default: the one recorded in the adapter.
        dtype: of the weights written; default: that of the model. Under DeepSpeed they are converted from the float32
            master weights.
        trust: load a checkpoint that contains more than tensors and plain values, which may run code.

    Returns:
        The exported checkpoint.

    Raises:
        FileNotFoundError: no checkpoint found.
        ValueError: `output` exists or is inside the checkpoint, a checkpoint without a model, or an adapter without
            its base.
        CheckpointError: the checkpoint is damaged, or contains code that is not trusted.
    """
    checkpoint = _checkpoint(source)
    if output.exists() or output.is_symlink():
        raise ValueError(f"output = {output} exists: choose another folder")
    if is_in(output, checkpoint):
        raise ValueError(f"output = {output} is inside the checkpoint {checkpoint}: choose another folder")
    if (checkpoint / MARKER).exists() and (wrong := checkpoints.fault(checkpoint)) is not None:
        raise CheckpointError(wrong)
    sharded = (checkpoint / "latest").exists()
    with loading(checkpoint, trust=trust, deepspeed=sharded), reading(checkpoint):
        masters = zero_weights(checkpoint) if sharded else None
        if (checkpoint / ADAPTER).exists():
            plain: Any = _merged(checkpoint, masters, model)
        elif masters is not None:
            config = AutoConfig.from_pretrained(checkpoint)
            plain = filled(AutoModelForCausalLM.from_config(config, dtype=torch.float32), masters)  # type: ignore[no-untyped-call]
            dtype = dtype or config.dtype
        else:
            plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    template = saved_template(checkpoint)
    if dtype is not None:
        plain = plain.to(dtype)
    draft = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        plain.save_pretrained(draft)
        if (checkpoint / "tokenizer_config.json").exists():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
            tokenizer.save_pretrained(draft)
            if template is not None:
                end_generation_at(plain, tokenizer, template)
                plain.generation_config.save_pretrained(draft)
        if template is not None:
            save_template(draft, template)
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return checkpoint


def zero_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Float32 weights of a DeepSpeed checkpoint by name (only the adapter's if the rest is frozen)."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    frozen = (checkpoint / ADAPTER).exists()
    found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), exclude_frozen_parameters=frozen)
    return {name: value.clone() for name, value in found.items()}


def filled(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Load these weights into `model`; a tied weight may be given once.

    Raises:
        ValueError: a weight is missing or unknown.
    """
    missing, unknown = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name in missing if name not in tied and name in dict(model.named_parameters())]
    if missing or unknown:
        raise ValueError(f"weights do not fit the model: missing {missing[:5]}, unknown {list(unknown)[:5]}")
    model.tie_weights()
    return model


def merged_from(adapted: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A plain model with the adapter merged, from a `peft` model whose weights may be sharded.

    Args:
        adapted: the `peft` model; only its configuration is read.
        weights: all its weights by name, unsharded.
    """
    from peft import get_peft_model

    wrapped: Any = adapted
    base = wrapped.get_base_model()
    name = wrapped.active_adapter
    fresh = get_peft_model(type(base)(base.config), wrapped.peft_config[name], adapter_name=name)
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    fresh.to(dtype).load_state_dict(weights)
    return merged(fresh)


def _checkpoint(source: Path) -> Path:
    if not source.is_dir():
        raise FileNotFoundError(f"no such checkpoint or run folder: {source}")
    if (source / checkpoints.STATE).exists() or (source / ADAPTER).exists():
        return source
    found = checkpoints.last_complete(source)
    if found is None:
        raise FileNotFoundError(f"{source} is not a checkpoint and has no complete one")
    return found


def _merged(checkpoint: Path, masters: Mapping[str, Tensor] | None, model: str | None) -> nn.Module:
    from peft import PeftConfig, PeftModel, get_peft_model

    config = PeftConfig.from_pretrained(str(checkpoint))
    name = model or config.base_model_name_or_path
    if not name:
        raise ValueError(f"model = None, and the adapter in {checkpoint} does not name its base model: give it")
    base, _ = load_model(name)
    if masters is None:
        adapted = PeftModel.from_pretrained(base, checkpoint)
    else:
        adapted = get_peft_model(base, config)
        _, unknown = adapted.load_state_dict(masters, strict=False)
        if unknown:
            raise ValueError(f"{checkpoint} does not fit {name}: unknown weights {list(unknown)[:5]}")
    return merged(adapted)
