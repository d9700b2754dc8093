"""The head of a model: what lies between its last hidden states and its logits.

    logits = softcap(scale * (h Wᵀ + bias + lora_scale * (h Aᵀ) Bᵀ))

Which configuration value scales the logits, and whether it multiplies or divides, differs between families,
even under the same name; the table below is taken from the source of transformers 5.23. A family that transforms its
logits differently fails the model check (`check`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_LOGIT_SCALES = {
    "cohere": ("logit_scale", 1),
    "hyperclovax": ("logits_scaling", 1),
    "granite": ("logits_scaling", -1),
    "minicpm3": ("logits_scaling", -1),
}
"""The value that multiplies (1) or divides (-1) the logits, by prefix of the model type (`granitemoehybrid` …)."""


class HeadOptions(TypedDict):
    """The head as keyword arguments of `linear_logprobs` and `linear_ranking_loss`."""

    bias: Tensor | None
    lora: tuple[Tensor, Tensor, float] | None
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True)
class ModelHead:
    """An LM head: weight [V, D], bias [V] or None, lora (A [r, D], B [V, r], scale) or None."""

    weight: Tensor
    bias: Tensor | None
    lora: tuple[Tensor, Tensor, float] | None
    logit_scale: float
    softcap: float | None

    def options(self) -> HeadOptions:
        """All fields except the weight."""
        return {
            "bias": self.bias,
            "lora": self.lora,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }


def read_head(model: PreTrainedModel, *, ahead: bool = False) -> ModelHead:
    """The head of a causal LM, including peft's adapter.

    Args:
        model: the causal LM.
        ahead: read before the pass that uses it, when ZeRO-3 may still hold the weights in shards.

    Raises:
        ValueError: no head, a head that is more than a linear layer, a sharded or missing weight, or an
            adapter that is not plain LoRA.
    """
    module: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if module is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: a causal LM with a head is required")
    linear, lora = _without_peft(module)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ValueError(f"the head of {type(model).__name__} is {type(linear).__name__}, not a linear layer")
    for hook in linear._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils"):  # weight_norm, spectral_norm
            raise ValueError(
                f"the head's weight is computed by a hook of its forward ({type(hook).__name__}), which the loss does "
                "not call: use torch.nn.utils.parametrizations instead"
            )
    for name, weight in (("weight", linear.weight), ("bias", linear.bias)):
        if weight is not None:
            _check_whole(name, weight, ahead)
    for name, weight in () if lora is None else (("LoRA A", lora[0]), ("LoRA B", lora[1])):
        _check_whole(name, weight, ahead)
    config = model.config.get_text_config()
    return ModelHead(linear.weight, linear.bias, lora, _logit_scale(model, config), _softcap(config))


def _logit_scale(model: PreTrainedModel, config: Any) -> float:
    for family, (name, power) in _LOGIT_SCALES.items():
        if config.model_type.startswith(family):
            # Models that multiply use their own copy of the value; Granite models have one but use the configuration.
            value = getattr(model, name, None) if power == 1 else None
            value = getattr(config, name, None) if value is None else value
            return 1.0 if value is None else float(value) ** power
    return 1.0


def _softcap(config: Any) -> float | None:
    softcap = getattr(config, "final_logit_softcapping", None)
    return None if softcap is None else float(softcap)


def _check_whole(name: str, tensor: Tensor, ahead: bool) -> None:
    """Reject a tensor that another library holds elsewhere: here it would be empty or a part.

    `ahead`: accept ZeRO-3 shards, which its hooks will have gathered when they are used.
    """
    if ahead and hasattr(tensor, "ds_id"):
        return
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            raise ValueError(f"the head's {name} is a DTensor (FSDP2, tensor parallel), sharded over ranks: {_REMEDY}")
    if tensor.numel() == 0 or tuple(tensor.shape) != tuple(getattr(tensor, "ds_shape", tensor.shape)):
        raise ValueError(f"the head's {name} is empty (ZeRO-3 or FSDP holds it in shards): {_REMEDY}")
    if tensor.device.type == "meta":
        raise ValueError(f"the head's {name} is on the meta device (offloaded or not loaded): {_REMEDY}")
    if not tensor.is_floating_point():
        raise ValueError(f"the head's {name} is quantised ({tensor.dtype}); keep the head in a floating dtype")


_REMEDY = (
    "no hook gathers a weight that is read outside the forward of the wrapped module; wrap "
    "tuna_kernels.integrations.transformers.RankingModel(model) with FSDP or DeepSpeed, with the head in the outermost "
    "unit, and pass the wrapper instead of the model"
)


def _without_peft(module: nn.Module) -> tuple[nn.Module, tuple[Tensor, Tensor, float] | None]:
    """The plain layer inside peft's wrappers, and the active LoRA factors."""
    if "peft" not in sys.modules:
        return module, None
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        if module.disable_adapters or not module.active_adapters:
            return module.original_module, None
        return module.modules_to_save[module.active_adapters[0]], None
    if isinstance(module, LoraLayer):
        return module.get_base_layer(), _lora_factors(module)
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ValueError(
            f"the head has a peft {type(module).__name__}; only LoRA and modules_to_save are supported on the head"
        )
    return module, None


def _lora_factors(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """(A [r, D], B [V, r], scale) of a peft LoRA layer, None if it has no active adapter."""
    if layer.disable_adapters:
        if layer.merged:
            raise ValueError(
                f"adapters {layer.merged_adapters} are both merged into the head and disabled: unmerge them first"
            )
        return None
    if layer.merged:  # part of the base weight; as in peft, A and B then get no gradient
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"{len(active)} LoRA adapters are active on the head ({active}); only one is supported")
    name = active[0]
    if name in layer.lora_variant or getattr(layer, "use_dora", {}).get(name):
        variant = type(layer.lora_variant.get(name)).__name__
        raise ValueError(f"adapter {name!r} on the head is not plain LoRA ({variant}: DoRA or another variant)")
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    if dropout > 0 and layer.training:
        raise ValueError(
            f"lora_dropout = {dropout} on the head in training mode: it would be drawn once for a row that several "
            "candidates share, but once per separate sequence; set it to 0"
        )
    a, b = layer.lora_A[name], layer.lora_B[name]
    if a.bias is not None or b.bias is not None:
        raise ValueError(f"adapter {name!r} on the head has a LoRA bias (lora_bias=True), which is not supported")
    return a.weight, b.weight, float(layer.scaling[name])


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrapper.

    Raises:
        TypeError: not a transformers model (or one wrapped by DDP, FSDP or DeepSpeed).
        ValueError: an adapter that works outside the layers (prompt or prefix tuning, activated LoRA).
    """
    if isinstance(model, PreTrainedModel):
        return model
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            for name in model.active_adapters:
                adapter = model.peft_config[name]
                if adapter.is_prompt_learning:
                    raise ValueError(f"adapter {name!r} is {adapter.peft_type}: its virtual tokens are not in the tree")
                if getattr(adapter, "alora_invocation_tokens", None):
                    raise ValueError(f"adapter {name!r} is an activated LoRA, which depends on the whole input")
            inner = model.get_base_model()
            if isinstance(inner, PreTrainedModel):
                return inner
    raise TypeError(
        f"model is {type(model).__name__}, not a transformers or peft model; a wrapper such as DDP, FSDP or DeepSpeed "
        "must wrap tuna_kernels.integrations.transformers.RankingModel(model)"
    )


def compute_device(model: PreTrainedModel) -> torch.device:
    """The device of the input embeddings, where token ids go."""
    return next(model.get_input_embeddings().parameters()).device
