"""Time of a step by a simple model, meant for comparing plans rather than for absolute predictions.

    compute  = products / (dense peak of the card x 0.45)
    update   = bytes of weights, gradients and states read and written / (memory bandwidth x 0.8)
    traffic  = bytes through the links between GPUs / (link x 0.7), hidden behind half of compute
    offload  = bytes to and from the host / (PCIe x 0.7), and AdamW on the host at 40 GB/s of its memory

0.45 is reached by well-tuned 7B training on A100 (model FLOPs utilisation 0.4 to 0.55 in published runs, counted
without recomputation; here recomputation is counted, so short sequences may stay below). Traffic over the links, in
units of the weights: stages 1 and 2 one all-reduce of gradients (2 in a ring) and one all-gather; stage 3 two or
three all-gathers (the third to recompute under checkpointing) and one reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tuna.plan.cards import Card
from tuna.plan.settings import Sharding, StepSettings
from tuna.plan.simulate import ModelCounts, StepMemory
from tuna.plan.states import optimizer_bytes

__all__ = ["StepTime", "step_time"]

ACHIEVED_COMPUTE = 0.45
ACHIEVED_MEMORY = 0.8
ACHIEVED_LINK = 0.7
HOST_ADAM_BYTES = 40e9
"""Bytes per second read and written by AdamW on the host, over all processes of a node."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step of one micro-batch, by part; `total` accounts for overlap."""

    compute: float
    update: float
    traffic: float
    offload: float
    total: float


def step_time(
    card: Card,
    step: StepMemory,
    counts: ModelCounts,
    sharding: Sharding,
    settings: StepSettings,
    optimizer: str,
) -> StepTime:
    """The time of one GPU's micro-batch by the model above."""
    tflops = card.float32_tflops if settings.dtype == torch.float32 else card.half_tflops
    compute = step.flops / (tflops * 1e12 * ACHIEVED_COMPUTE)
    trained = torch.float32 if settings.lora_rank is not None else settings.dtype
    own = counts.trainable / (sharding.gpus if sharding.stage else 1)
    moved = own * (2 * optimizer_bytes(optimizer, trained) + 3 * trained.itemsize)  # type: ignore[arg-type]
    update = moved / (card.memory_gbs * 1e9 * ACHIEVED_MEMORY)
    traffic = _link_bytes(counts, sharding, settings) / (card.link_gbs * 1e9 * ACHIEVED_LINK)
    offload = 0.0
    if sharding.offload != "none":
        update = 0.0
        # gradients out and weights back for this GPU's shard; the host updates all shards of a node at once
        both_ways = 2 * counts.trainable / sharding.gpus * trained.itemsize
        if sharding.offload == "all":
            both_ways += _passes(settings) * counts.parameters / sharding.gpus * settings.dtype.itemsize
        offload = both_ways / (card.pcie_gbs * 1e9 * ACHIEVED_LINK)
        offload += moved * sharding.on_host / HOST_ADAM_BYTES
    total = compute + update + max(0.0, traffic - compute / 2) + offload
    return StepTime(compute, update, traffic, offload, total)


def _passes(settings: StepSettings) -> int:
    """Number of passes over the weights."""
    return 3 if settings.checkpointing else 2


def _link_bytes(counts: ModelCounts, sharding: Sharding, settings: StepSettings) -> float:
    n = sharding.gpus
    if n == 1:
        return 0.0
    trained = 4 if settings.lora_rank is not None else settings.dtype.itemsize
    gradients, weights = counts.trainable * trained, counts.parameters * settings.dtype.itemsize
    share = (n - 1) / n
    if sharding.stage == 3:
        return share * (_passes(settings) * weights + gradients)
    return share * (2 * gradients + (counts.trainable * trained if sharding.stage else 0))
