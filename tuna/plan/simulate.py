"""Simulation of the real step with fake tensors: its memory besides weights, gradients and optimizer states.

Layers are alike, so a step is simulated with few layers, at two depths, and the memory at every moment is extrapolated
linearly: exact, and fast for any model. Gradients are assumed to exist before the step, as under gradient
accumulation, in frameworks with a gradient buffer, and from the second micro-batch on. So a new gradient is a temporary
that is added to the existing one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from tuna.plan.settings import StepSettings
from tuna.plan.sizes import at_depth, layer_period
from tuna.plan.steps import make_trainable, prepared_step
from tuna.plan.tracker import Moment, StepTracker
from tuna.plan.workload import Workload, share_of
from tuna_kernels import Group, pack_groups
from tuna_kernels.integrations.transformers import prepare_model
from tuna_kernels.integrations.transformers.head import base_causal_lm

__all__ = ["ModelCounts", "Simulator", "StepMemory", "StepSettings"]


@dataclass(frozen=True)
class ModelCounts:
    """Numbers of parameters: total, trainable, of the largest tensor, of one layer, of the LM head."""

    parameters: int
    trainable: int
    largest: int
    layer: int
    head: int


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one micro-batch beyond model states, and its FLOPs.

    Attributes:
        peak: the maximum over all moments; `peak_at` names the moment.
        saved: the part of `peak` allocated before the head of that pass: what the trunk keeps for its backward,
            and in two phases the shared keys, values and their gradients.
        flops: floating-point operations of the matrix products of forward and backward, recomputation included.
        tokens: tokens through the trunk; `unshared_tokens`: without padding and sharing.
        moments: bytes at each moment, the maximum over all passes.
    """

    peak: int
    peak_at: str
    saved: int
    flops: int
    tokens: int
    unshared_tokens: int
    moments: dict[str, int]


class Simulator:
    """Simulates steps of one model; every distinct step is simulated once.

    Args:
        config: the model's transformers configuration.
        whole: simulate all layers instead of extrapolating from two depths (slow, for checks).
    """

    def __init__(self, config: PretrainedConfig, *, whole: bool = False) -> None:
        self.config, self.whole = config, whole
        self._known: dict[tuple[Any, ...], StepMemory] = {}
        self._counts: dict[int | None, ModelCounts] = {}

    @property
    def layers(self) -> int:
        """Number of layers of the model."""
        return int(self.config.get_text_config().num_hidden_layers)

    def step(self, workload: Workload, groups: int, settings: StepSettings) -> StepMemory:
        """One micro-batch of `groups` groups."""
        key = (workload, groups, settings)
        if key not in self._known:
            batch = workload.batch(groups, settings.method)
            self._known[key] = _extended(
                [(depth, simulate_step(at_depth(self.config, depth), batch, settings)) for depth in self._depths()],
                self.layers,
                batch,
                settings,
            )
        return self._known[key]

    def counts(self, lora_rank: int | None = None) -> ModelCounts:
        """Numbers of parameters of the whole model, with adapters of the given rank."""
        if lora_rank not in self._counts:
            settings = StepSettings(lora_rank=lora_rank)
            found = [(depth, _count(_model(at_depth(self.config, depth), settings))) for depth in self._depths()]
            self._counts[lora_rank] = _extended_counts(found, self.layers)
        return self._counts[lora_rank]

    def _depths(self) -> list[int]:
        period = layer_period(self.config)
        first = self.layers % period + period * (1 if self.layers % period else 2)
        first = max(first, 2) if period == 1 else first
        if self.whole or self.layers <= first + period:
            return [self.layers]
        return [first, first + period]


@dataclass(frozen=True)
class Simulated:
    """The result of `simulate_step` at one depth."""

    peaks: dict[Moment, int]
    saved: dict[int, int]
    flops: int


def simulate_step(config: PretrainedConfig, batch: list[Group], settings: StepSettings) -> Simulated:
    """Forward and backward of a micro-batch on a model of exactly this configuration, with fake tensors."""
    tracker = StepTracker(settings.attention_backend, settings.head_backend)
    step = prepared_step(batch, settings)
    model = _model(config, settings)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_storage(model)
        if settings.method != "baseline":
            prepare_model(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        backbone = base_causal_lm(model).base_model
        with tracker.follow(model, backbone, _layers(backbone, config)):
            step(model, tracker.wanted)
    return Simulated(tracker.peaks, tracker.saved, tracker.flops)


def _model(config: PretrainedConfig, settings: StepSettings) -> nn.Module:
    """The model on the meta device, where peft can move adapters."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        try:
            model = auto.from_config(config, dtype=settings.dtype, attn_implementation="sdpa")
        except ValueError:  # a family without it, for example with softcapped scores
            model = auto.from_config(config, dtype=settings.dtype, attn_implementation="eager")
        return make_trainable(model, settings)


def _give_storage(model: nn.Module) -> None:
    """Replace the meta tensors of a model by tensors of the active mode; tied parameters stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None or id(old) in made:
                    table[name] = None if old is None else made[id(old)]  # type: ignore[assignment]
                    continue
                new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]  # type: ignore[assignment]


def _layers(backbone: nn.Module, config: PretrainedConfig) -> nn.ModuleList:
    count = config.get_text_config().num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{type(backbone).__name__} has no list of its {count} layers: its step cannot be divided into moments"
    )


def _count(model: nn.Module) -> dict[str, int]:
    inner: Any = model
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "trainable": sum(size for size, trainable in sizes if trainable),
        "largest": max(size for size, _ in sizes),
        "head": inner.get_output_embeddings().weight.numel(),
    }


def _extended_counts(found: list[tuple[int, dict[str, int]]], layers: int) -> ModelCounts:
    total = {name: _line([(depth, counts[name]) for depth, counts in found], layers) for name in found[0][1]}
    outside = 2 * total["head"]
    layer = (total["parameters"] - outside) // layers if len(found) == 1 else _slope(found, "parameters")
    return ModelCounts(total["parameters"], total["trainable"], total["largest"], layer, total["head"])


def _slope(found: list[tuple[int, dict[str, int]]], name: str) -> int:
    (a, low), (b, high) = found
    return (high[name] - low[name]) // (b - a)


def _line(points: list[tuple[int, int]], at: int) -> int:
    """The value at `at` of the line through one (constant) or two points."""
    if len(points) == 1:
        return points[0][1]
    (a, low), (b, high) = points
    return low + (high - low) * (at - a) // (b - a)


def _extended(
    found: list[tuple[int, Simulated]], layers: int, batch: list[Group], settings: StepSettings
) -> StepMemory:
    first = found[0][1]
    # "middle" exists only at the greater depth, between "top" and "bottom".
    keys = [key for key in first.peaks if all(key in step.peaks for _, step in found)]
    peaks = {key: _line([(depth, step.peaks[key]) for depth, step in found], layers) for key in keys}
    saved = {call: _line([(depth, step.saved[call]) for depth, step in found], layers) for call in first.saved}
    peak_at = max(peaks, key=lambda key: peaks[key])
    tree = None if settings.method == "baseline" else pack_groups(batch, share=share_of(settings.method))
    lengths = [len(group.prompt) + len(response) for group in batch for response in group.responses]
    moments: dict[str, int] = {}
    for (_, part), value in peaks.items():
        moments[MOMENTS[part]] = max(moments.get(MOMENTS[part], 0), value)
    return StepMemory(
        peak=peaks[peak_at],
        peak_at=MOMENTS[peak_at[1]],
        saved=min(saved.get(peak_at[0], 0), peaks[peak_at]),
        flops=_line([(depth, step.flops) for depth, step in found], layers),
        tokens=len(lengths) * max(lengths) if tree is None else tree.num_tokens,
        unshared_tokens=sum(lengths),
        moments=moments,
    )


MOMENTS = {
    "forward": "forward",
    "head": "head and loss",
    "top": "backward of the last layer",
    "middle": "backward",
    "bottom": "backward of the first layer",
    "embedding": "backward of the embedding",
}
