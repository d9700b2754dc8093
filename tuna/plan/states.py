"""Model states on each GPU and in host memory: weights, gradients, optimizer, under ZeRO and offload.

With P parameters (T trainable), n GPUs and bytes per parameter w (weight), g (gradient), o (optimizer):

    stage          weights   gradients   optimizer
    0              wP        gT          oT
    1              wP        gT          oT/n
    2              wP        gT/n        oT/n
    3              wP/n      gT/n        oT/n

o: float32 masters, momentum and variance 12 (8 for float32 weights, which are their own masters); `kahan`:
momentum, variance and compensation in bfloat16, 6; `adamw8bit`: float32 masters, and both moments in 8 bits
with one float32 scale per 256 values, 6.03.

At the optimizer step DeepSpeed makes a float32 copy of the half-precision gradients it owns, 4T/n (in stage 3 for a
sub-group of 1e9 parameters at a time). No activations are held then, so the step is a separate moment. With the copy
the sum is 2P + 18P/n in stage 2, as in DeepSpeed's own estimator; its 18P/n for stage 3 ignores sub-groups and
omits the half-precision gradients.

Offload of the optimizer moves o, and the float32 gradient, to the host, where DeepSpeed's estimators add half as
much for pinned buffers; gradients leave the GPU bucket by bucket. Offload of the parameters (stage 3) leaves only
those in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from tuna.plan.settings import Optimizer, Sharding
from tuna.plan.simulate import ModelCounts

__all__ = ["StateMemory", "model_states"]

SUB_GROUP = 10**9
"""DeepSpeed's default of zero_optimization.sub_group_size, in parameters."""
BUCKET, BUCKET_STAGE_3, MAX_LIVE = 200_000_000, 50_000_000, 500_000_000
"""Parameters of reduce_bucket_size in stages 1 and 2 and in stage 3, and of stage3_max_live_parameters, as in the
configurations that come with this project (`configs/deepspeed`)."""
HOST_FACTOR = 1.5
"""Ratio of host memory to the size of offloaded states, as in DeepSpeed's estimators."""


@dataclass(frozen=True)
class StateMemory:
    """Bytes on each GPU, except `host` (of one node).

    `gradient_copy` exists only during the optimizer step; `buffers` are communication buckets and, in stage 3,
    the gathered weights in use.
    """

    weights: int
    gradients: int
    optimizer: int
    gradient_copy: int
    buffers: int
    host: int

    @property
    def held(self) -> int:
        """Bytes held throughout the step."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def at_update(self) -> int:
        """Bytes held during the optimizer step."""
        return self.held + self.gradient_copy


def optimizer_bytes(optimizer: Optimizer, dtype: torch.dtype) -> float:
    """Bytes of optimizer state per trainable parameter.

    Raises:
        ValueError: an unknown optimizer, or `kahan` for another dtype than bfloat16.
    """
    masters = 0 if dtype == torch.float32 else 4
    if optimizer == "adamw":
        return masters + 8
    if optimizer == "adamw8bit":
        return masters + 2 * (1 + 4 / 256)
    if optimizer == "kahan":
        if dtype != torch.bfloat16:
            raise ValueError(f"optimizer = 'kahan' keeps bfloat16 states; weights are {dtype}, not torch.bfloat16")
        return 6
    raise ValueError(f"optimizer = {optimizer!r} is not one of {get_args(Optimizer)}")


def model_states(
    counts: ModelCounts,
    sharding: Sharding,
    *,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: Optimizer = "adamw",
    trainable_dtype: torch.dtype | None = None,
    sub_group: int = SUB_GROUP,
) -> StateMemory:
    """States of a model under a sharding.

    Args:
        counts: numbers of parameters of the model.
        sharding: GPUs, stage, offload.
        dtype: of the weights.
        optimizer: see the module docstring.
        trainable_dtype: of the trained weights, if it differs from the rest (float32 adapters).
        sub_group: number of parameters whose gradients stage 3 converts at a time.
    """
    trained = trainable_dtype or dtype
    frozen, own = counts.parameters - counts.trainable, counts.trainable
    weights = frozen * dtype.itemsize + own * trained.itemsize
    stage, n = sharding.stage, sharding.gpus
    offloaded = sharding.offload != "none"
    states = optimizer_bytes(optimizer, trained) * own
    copied = own if trained != torch.float32 and optimizer != "kahan" else 0
    gradients = own * trained.itemsize / (n if stage >= 2 else 1)
    if offloaded and stage >= 2:
        gradients = 0
    copy = 4 * min(copied / n, sub_group) if stage == 3 else 4 * copied / (n if stage else 1)
    on_gpu = weights / (n if stage == 3 else 1) if sharding.offload != "all" else 0
    host = 0.0
    if offloaded:
        host = HOST_FACTOR * (states + 4 * copied) * sharding.on_host / n
    if sharding.offload == "all":
        host += HOST_FACTOR * weights * sharding.on_host / n
    return StateMemory(
        weights=int(on_gpu),
        gradients=int(gradients),
        optimizer=0 if offloaded else int(states / (n if stage else 1)),
        gradient_copy=0 if offloaded else int(copy),
        buffers=_buffers(counts, sharding, dtype, trained),
        host=int(host),
    )


def _buffers(counts: ModelCounts, sharding: Sharding, dtype: torch.dtype, trained: torch.dtype) -> int:
    """Two gradient buckets (one is filled while the other is reduced or moved); in stage 3 also gathered weights.

    Gathered at the same time are at least a layer and the next one, which is prefetched, or a layer and the head or
    the embedding.
    """
    stage = sharding.stage
    if stage == 0 and sharding.gpus == 1:
        return 0
    bucket = (BUCKET if stage < 3 else BUCKET_STAGE_3) if sharding.bucket is None else sharding.bucket
    buckets = min(2 * bucket, counts.trainable) * trained.itemsize
    live = min(counts.parameters, max(MAX_LIVE, counts.layer + max(counts.layer, counts.head)))
    return buckets + (live * dtype.itemsize if stage == 3 else 0)
