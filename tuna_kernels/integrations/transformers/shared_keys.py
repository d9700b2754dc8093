"""Keys and values of a prompt that several passes share, by attention layer.

Shared keys are passed in `attention_hook.TreePass`, not in a transformers `Cache`: transformers drops caches
when layers are checkpointed. A pass has one of three roles:

    KeepPrompts     scores without a graph and keeps the prompt rows' keys and values of every group
    AttendToPrompt  computes responses only, whose keys and values are appended to the kept ones
    CollectRoots    computes the prompt only, whose keys and values are where the backward starts

`AttendToPrompt` turns the kept tensors into leaves if the layer's own keys (or values) need a gradient, so
layers that are frozen below the adapters get no leaves. Their gradients are summed over the passes in
float32 (float64 for float64 keys), since k half-precision additions would lose bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["AttendToPrompt", "CollectRoots", "KeepPrompts", "KeyRole", "PromptKeys"]

Pair = tuple[Tensor, Tensor]


class KeyRole(Protocol):
    """What a pass does with the keys and values [1, Hkv, rows, d] of an attention layer before it attends."""

    def __call__(self, layer: nn.Module, key: Tensor, value: Tensor, first_run: bool) -> Pair:
        """Keys and values to attend to. `first_run` is False when a checkpointed layer is recomputed."""
        ...


@dataclass(eq=False)
class PromptKeys:
    """Keys and values of one group's shared prompt rows, and the sum of their gradients so far.

    Attributes:
        kept: per layer keys and values [1, Hkv, shared rows, d].
        sums: per layer the sums of the gradients, None if there are none yet.
    """

    kept: dict[nn.Module, Pair] = field(default_factory=dict)
    sums: dict[nn.Module, list[Tensor | None]] = field(default_factory=dict)

    def add_gradient(self, layer: nn.Module, which: int, gradient: Tensor) -> None:
        """Add to the sum for a layer's keys (0) or values (1)."""
        sums = self.sums.setdefault(layer, [None, None])
        if (total := sums[which]) is None:
            sums[which] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        else:
            total.add_(gradient)

    def nbytes(self) -> int:
        """Current bytes of keys, values and sums."""
        held = [tensor for pair in (*self.kept.values(), *self.sums.values()) for tensor in pair if tensor is not None]
        return sum(tensor.nbytes for tensor in held)


class KeepPrompts:
    """Keeps `key[:, :, start:stop]` and `value[:, :, start:stop]` of every group, without a graph."""

    def __init__(self, bounds: list[tuple[int, int]]) -> None:
        self._bounds = bounds
        self.groups = [PromptKeys() for _ in bounds]

    def __call__(self, layer: nn.Module, key: Tensor, value: Tensor, first_run: bool) -> Pair:
        for group, (start, stop) in zip(self.groups, self._bounds, strict=True):
            if layer in group.kept:
                raise ValueError(
                    f"{type(layer).__name__} attends twice in one pass (layers that share their weights or keys), so "
                    "its prompt's keys cannot be kept by layer: use the one-pass loss"
                )
            if stop > start:
                # clone: a view would keep the keys of the whole row alive
                group.kept[layer] = (
                    key[:, :, start:stop].detach().clone(),
                    value[:, :, start:stop].detach().clone(),
                )
        return key, value


class AttendToPrompt:
    """Prepends the prompt's keys and values to the pass's own."""

    def __init__(self, prompt: PromptKeys) -> None:
        self._prompt = prompt
        self._leaves: dict[tuple[nn.Module, int], Tensor] = {}

    def __call__(self, layer: nn.Module, key: Tensor, value: Tensor, first_run: bool) -> Pair:
        if not self._prompt.kept:  # a prompt of one token shares no row
            return key, value
        if layer not in self._prompt.kept:
            raise ValueError(f"{type(layer).__name__} attends here but did not when the candidates were scored")
        joined = [
            torch.cat([self._leaf(layer, which, kept, own.requires_grad), own], dim=2)
            for which, (kept, own) in enumerate(zip(self._prompt.kept[layer], (key, value), strict=True))
        ]
        return joined[0], joined[1]

    def _leaf(self, layer: nn.Module, which: int, kept: Tensor, needs_gradient: bool) -> Tensor:
        if not needs_gradient:
            return kept
        if (known := self._leaves.get((layer, which))) is not None:
            return known
        leaf = self._leaves[layer, which] = kept.detach().requires_grad_()
        prompt = self._prompt  # not self: a cycle through the leaves would outlive the pass

        def collect(leaf: Tensor) -> None:
            assert leaf.grad is not None
            prompt.add_gradient(layer, which, leaf.grad)
            leaf.grad = None  # added to the sum at once: a layer's gradient lives no longer than its backward

        leaf.register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]
        return leaf


class CollectRoots:
    """Keeps keys and values with their graph, in the order of the layers."""

    def __init__(self) -> None:
        self.roots: dict[nn.Module, Pair] = {}

    def __call__(self, layer: nn.Module, key: Tensor, value: Tensor, first_run: bool) -> Pair:
        if first_run:
            self.roots[layer] = (key, value)
        return key, value
