"""What is planned: a step, a sharding and the GPUs, as the planner's rooms share them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch

from tuna.plan.cards import Card
from tuna.plan.workload import Method, Workload
from tuna_kernels.losses import Preset

__all__ = ["Offload", "Optimizer", "PlanRequest", "Sharding", "StepSettings"]

Optimizer: TypeAlias = Literal["adamw", "kahan", "adamw8bit"]
Offload: TypeAlias = Literal["none", "optimizer", "all"]


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed.

    Attributes:
        dtype: of weights, activations and gradients. LoRA adapters are float32, as peft makes them.
        preset: of the loss.
        logits_budget: as in `linear_ranking_loss`.
        attention_backend, head_backend: whose `workspace_bytes` count; "auto" is what a CUDA device takes.
    """

    method: Method = field(
        default="one_pass", metadata={"help": "How the step is computed; the others are compared with it."}
    )
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = field(
        default=True, metadata={"help": "Recompute the activations of each layer in the backward pass."}
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Rank of LoRA adapters on all linear layers; without it, all weights are trained."},
    )
    preset: Preset = "released"
    logits_budget: int | None = None
    attention_backend: str = "torch"
    head_backend: str = "torch"
    candidates_per_pass: int = field(default=1, metadata={"help": "Candidates per pass of method two_phase."})

    def __post_init__(self) -> None:
        for name, value in (("lora_r", self.lora_rank), ("candidates_per_pass", self.candidates_per_pass)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")


@dataclass(frozen=True)
class Sharding:
    """How model states are spread.

    Attributes:
        bucket: parameters of a communication bucket (reduce_bucket_size); None: DeepSpeed's, see `tuna.plan.states`.
    """

    gpus: int = field(default=1, metadata={"help": "Number of GPUs, over all nodes."})
    gpus_per_node: int = field(default=8, metadata={"help": "GPUs per node."})
    stage: int = field(default=0, metadata={"help": "ZeRO stage, 0 to 3; tuna plan tries the lowest that fits."})
    offload: Offload = field(default="none", metadata={"help": "States to keep in host memory."})
    bucket: int | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"zero = {self.stage} is not one of 0, 1, 2, 3")
        if self.offload not in get_args(Offload):
            raise ValueError(f"offload = {self.offload!r} is not one of {get_args(Offload)}")
        if self.offload == "optimizer" and self.stage < 1:
            raise ValueError("offload = 'optimizer' needs zero = 1, 2 or 3: it is DeepSpeed that moves the states")
        if self.offload == "all" and self.stage != 3:
            raise ValueError(f"offload = 'all' needs zero = 3 (given: {self.stage}): only it can part with weights")

    @property
    def on_host(self) -> int:
        """GPUs that share one host."""
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True, eq=False)
class PlanRequest:
    """What is to be trained, and on what.

    Attributes:
        card: the GPU.
        workload: lengths of the groups.
        settings: how the step is computed.
        sharding: GPUs, stage, offload.
        host_memory: bytes of each node's memory; None: whatever it takes.
    """

    card: Card
    workload: Workload
    groups: int = field(default=1, metadata={"help": "Groups per micro-batch and GPU."})
    settings: StepSettings = field(default_factory=StepSettings)
    sharding: Sharding = field(default_factory=Sharding)
    optimizer: Optimizer = field(
        default="adamw",
        metadata={"help": "AdamW with float32 masters, with bfloat16 states (kahan), or with 8-bit moments."},
    )
    host_memory: int | None = None

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups = {self.groups} must be at least 1")
        if self.host_memory is not None and self.host_memory < 0:
            raise ValueError(f"host_memory = {self.host_memory} must be at least 0")
