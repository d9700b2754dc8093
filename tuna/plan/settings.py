"""Settings of a step, shared by the modules of the planner."""

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
        lora_rank: rank of adapters on all linear layers of the trunk, in float32 as made by peft; None: full
            fine-tuning.
        preset: of the loss.
        logits_budget: as in `linear_ranking_loss`.
        attention_backend, head_backend: backends whose `workspace_bytes` count; "auto" is the choice on CUDA devices.
        candidates_per_pass: for two phases.
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
