"""How a step is computed, as the planner's rooms share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tuna.plan.workload import Method
from tuna_kernels.losses import Preset

__all__ = ["StepSettings"]


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed.

    Attributes:
        method: see `tuna.plan.workload.Method`.
        dtype: of weights, activations and gradients.
        checkpointing: recompute each layer in the backward instead of keeping its activations.
        lora_rank: rank of adapters on all linear layers of the trunk, float32 as peft makes them; None: train
            everything.
        preset: of the loss.
        logits_budget: as in `linear_ranking_loss`.
        attention_backend, head_backend: whose `workspace_bytes` count; "auto" is what a CUDA device takes.
        candidates_per_pass: of two-phase.
    """

    method: Method = "one_pass"
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = True
    lora_rank: int | None = None
    preset: Preset = "released"
    logits_budget: int | None = None
    attention_backend: str = "torch"
    head_backend: str = "torch"
    candidates_per_pass: int = 1
