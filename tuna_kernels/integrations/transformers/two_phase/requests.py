"""The passes of the two-phase schedule, each a `ModelRequest` to a causal LM.

KeepPass     scores a layout without a graph and keeps the keys and values of its prompts
BranchPass   some candidates on top of a kept prompt, to score them or for the backward
PromptPass   the prompt only, for the backward from the gradients of its keys and values
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuna_kernels.head.logprobs import linear_logprobs
from tuna_kernels.integrations.transformers.attention_hook import DENSE, OWN_ATTENTION, TreePass
from tuna_kernels.integrations.transformers.head import base_causal_lm, compute_device, read_head
from tuna_kernels.integrations.transformers.models import attention_backend, prepare_model, run_backbone
from tuna_kernels.integrations.transformers.shared_keys import (
    AttendToPrompt,
    CollectRoots,
    KeepPrompts,
    KeyRole,
    PromptKeys,
)
from tuna_kernels.integrations.transformers.two_phase.passes import Layout

__all__ = ["BranchPass", "KeepPass", "PromptPass", "why_not_two_phase"]


@dataclass(eq=False)
class KeepPass:
    """Rows with whole prompts, without a graph: returns (logprobs [m],) and stores the prompts' keys in `prompts`.

    Attributes:
        layout: the rows.
        bounds: `start:stop` of the shared rows of each prompt in the layout.
        backend: as in `model_ranking_loss`.
        prompts: one per bound, filled by the call.
    """

    layout: Layout
    bounds: list[tuple[int, int]]
    backend: str
    prompts: list[PromptKeys] = field(default_factory=list)

    def __call__(self, model: nn.Module) -> tuple[Tensor, ...]:
        prepare_model(model)
        base = base_causal_lm(model)
        if reason := why_not_two_phase(base):
            raise ValueError(reason)
        role = KeepPrompts(self.bounds)
        hidden = _run(base, self.layout, role, self.backend)
        self.prompts = role.groups
        return (_logprobs(base, hidden, self.layout.rows, self.layout.targets, self.backend),)


@dataclass(frozen=True, eq=False)
class BranchPass:
    """Some candidates of a group on top of its prompt: returns (sum of `grad_logprobs` [m] times log-probability,).

    Without `grad_logprobs` it returns the log-probabilities: (logprobs [m],).
    """

    layout: Layout
    prompt: PromptKeys
    grad_logprobs: Tensor | None
    backend: str

    def __call__(self, model: nn.Module) -> tuple[Tensor, ...]:
        base = base_causal_lm(model)
        hidden = _run(base, self.layout, AttendToPrompt(self.prompt), self.backend)
        logprobs = _logprobs(base, hidden, self.layout.rows, self.layout.targets, self.backend)
        if self.grad_logprobs is None:
            return (logprobs,)
        return ((logprobs * self.grad_logprobs.to(logprobs.device)).sum(),)


@dataclass(frozen=True, eq=False)
class PromptPass:
    """The shared prompt rows: returns (a scalar whose backward starts at their keys and values,).

    It also runs the head, with weight 0, so that every parameter takes part as in any other pass, which the hooks of
    DDP, FSDP and ZeRO expect.
    """

    layout: Layout
    prompt: PromptKeys
    backend: str

    def __call__(self, model: nn.Module) -> tuple[Tensor, ...]:
        base = base_causal_lm(model)
        role = CollectRoots()
        hidden = _run(base, self.layout, role, self.backend)
        nothing = 0 * _logprobs(base, hidden, self.layout.rows, self.layout.targets, self.backend).sum()
        roots, gradients = self._known(role)
        if not roots:
            return (nothing,)
        return (nothing + _KnownGradients.apply(gradients, *roots),)  # type: ignore[no-untyped-call]

    def _known(self, role: CollectRoots) -> tuple[list[Tensor], list[Tensor]]:
        """Roots and their gradients, which are removed from `prompt.sums`."""
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        for layer, sums in self.prompt.sums.items():
            for root, total in zip(role.roots[layer], sums, strict=True):
                if total is None:
                    continue
                if not root.requires_grad:
                    raise ValueError(
                        f"the prompt's keys in {type(layer).__name__} are outside the graph, as under reentrant "
                        "activation checkpointing: use gradient_checkpointing_kwargs={'use_reentrant': False}"
                    )
                roots.append(root)
                gradients.append(total.to(root.dtype))
        self.prompt.sums.clear()
        return roots, gradients


class _KnownGradients(torch.autograd.Function):
    """A scalar 0 whose backward passes each root its known gradient.

    The upstream gradient is not multiplied in: the known gradients come from backwards of the same call and
    already include it (loss scaling, accumulation).
    """

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *roots: Tensor) -> Tensor:
        ctx.gradients = gradients
        return roots[0].new_zeros((), dtype=torch.promote_types(roots[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "two_phase_ranking_loss has no second derivative (create_graph=True, a gradient penalty): the "
                'gradients of the prompt are constants; use model_ranking_loss with backend="reference"'
            )
        gradients, ctx.gradients = ctx.gradients, []
        return None, *gradients


def _run(base: PreTrainedModel, layout: Layout, role: KeyRole, backend: str) -> Tensor:
    layout = layout.to(compute_device(base))
    tree_pass = TreePass(
        layout.subtree_end,
        layout.position_ids,
        attention_backend(base, backend),
        query_rows=layout.query_rows,
        role=role,
    )
    return run_backbone(base, layout.input_ids, tree_pass)


def _logprobs(base: PreTrainedModel, hidden: Tensor, rows: Tensor, targets: Tensor, backend: str) -> Tensor:
    head = read_head(base)
    rows, targets = rows.to(hidden.device), targets.to(hidden.device)
    found = linear_logprobs(hidden, head.weight, targets, rows=rows, backend=backend, **head.options())
    assert isinstance(found, Tensor)
    return found


def why_not_two_phase(model: nn.Module) -> str:
    """Why a model in its current state cannot be trained in two phases; "" if nothing is known against it."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == DENSE:
            return OWN_ATTENTION
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return (
                f"dropout = {module.p} in {name!r} in training mode: scores and gradients would use different masks; "
                "set it to 0 (also lora_dropout) or use the one-pass loss"
            )
        # transformers stores the checkpointing function on every module that uses it
        checkpointing = getattr(module, "_gradient_checkpointing_func", None)
        in_use = checkpointing is not None and getattr(module, "gradient_checkpointing", False)
        if in_use and getattr(checkpointing, "keywords", {}).get("use_reentrant", True):
            return (
                "reentrant activation checkpointing keeps the prompt's keys out of the graph: enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
    return ""
