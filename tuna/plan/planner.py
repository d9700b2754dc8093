"""From a step and a sharding to a plan: memory per GPU, whether it fits, and the fewest GPUs needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tuna.plan.settings import Offload, PlanRequest, Sharding
from tuna.plan.simulate import Simulator, StepMemory
from tuna.plan.states import StateMemory, model_states
from tuna.plan.timing import StepTime, step_time

__all__ = ["Plan", "Planner", "fewest_gpus", "largest_batch"]

GIB = 2**30
CONTEXT = int(0.6 * GIB)
"""CUDA context, cuBLAS workspaces and the allocator's own tables of one process."""
COMMUNICATOR = int(0.4 * GIB)
"""NCCL's buffers, with more than one GPU."""
FRAGMENTATION = 0.05
"""Fraction of the memory held by PyTorch's caching allocator; 0.02 to 0.1 is seen with expandable segments."""
LARGEST = 128
"""Upper limit of groups per micro-batch: the GPU is fully used long before."""
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class Plan:
    """Memory and time of a request. Sizes are in bytes per GPU unless stated otherwise.

    Attributes:
        request: the request.
        states: model states and buffers.
        step: the simulated micro-batch.
        time: of an optimizer step of one micro-batch.
        allowance: context, communicator and fragmentation: constants of this module.
        peak, peak_at: peak memory of a GPU, allowance included, and its moment.
    """

    request: PlanRequest
    states: StateMemory
    step: StepMemory
    time: StepTime
    allowance: int
    peak: int
    peak_at: str

    @property
    def capacity(self) -> int:
        """Memory of the card in bytes."""
        return self.request.card.memory

    @property
    def fits(self) -> bool:
        """Whether it fits in the card's memory, and in host memory if that is known."""
        return not self.why_not

    @property
    def why_not(self) -> str:
        """Why it does not fit; "" if it does."""
        if self.peak > self.capacity:
            largest = max(self.parts().items(), key=lambda part: part[1])
            return (
                f"needs {self.peak / GIB:.1f} GiB of the {self.capacity / GIB:.1f} GiB of {self.request.card.label} "
                f"({self.peak_at}); the largest part is {largest[0]}, {largest[1] / GIB:.1f} GiB"
            )
        limit = self.request.host_memory
        if limit is not None and self.states.host > limit:
            needed, there = self.states.host / GIB, limit / GIB
            return f"needs {needed:.0f} GiB of host memory for offloaded states, {there:.0f} GiB are available"
        return ""

    def parts(self) -> dict[str, int]:
        """Bytes by part at the peak; their sum is `peak`."""
        states, step = self.states, self.step
        parts = {
            "weights": states.weights,
            "gradients": states.gradients,
            "optimizer": states.optimizer,
            "buffers": states.buffers,
        }
        if self.peak_at == "optimizer step":
            parts |= {"float32 gradients": states.gradient_copy}
        else:
            more = "head" if step.peak_at.startswith("head") else "layer at work"
            parts |= {"activations": step.saved, more: step.peak - step.saved}
        return {**parts, "allowance": self.allowance}

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        request = self.request
        settings = {**asdict(request.settings), "dtype": str(request.settings.dtype).removeprefix("torch.")}
        return {
            "gpu": request.card.name,
            "capacity_bytes": self.capacity,
            "groups": request.groups,
            "workload": request.workload.describe(),
            "settings": settings,
            "sharding": asdict(request.sharding),
            "optimizer": request.optimizer,
            "fits": self.fits,
            "why_not": self.why_not,
            "peak_bytes": self.peak,
            "peak_at": self.peak_at,
            "parts_bytes": self.parts(),
            "step": asdict(self.step),
            "host_bytes": self.states.host,
            "seconds": asdict(self.time),
        }


class Planner:
    """Plans for one model.

    Args:
        simulator: of the model.
    """

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    def plan(self, request: PlanRequest) -> Plan:
        """Plan a request, whether it fits or not.

        Raises:
            ValueError: contradictory settings.
        """
        settings = request.settings
        if settings.dtype == torch.bfloat16 and not request.card.bfloat16:
            raise ValueError(
                f"precision = 'bf16' on {request.card.label}, which has no bfloat16: use fp16 (with loss scaling) "
                "or fp32"
            )
        counts = self.simulator.counts(settings.lora_rank)
        states = model_states(
            counts,
            request.sharding,
            dtype=settings.dtype,
            optimizer=request.optimizer,
            trainable_dtype=torch.float32 if settings.lora_rank is not None else None,
        )
        step = self.simulator.step(request.workload, request.groups, settings)
        held, at = states.held + step.peak, step.peak_at
        if states.at_update > held:
            held, at = states.at_update, "optimizer step"
        allowance = CONTEXT + (COMMUNICATOR if request.sharding.gpus > 1 else 0) + int(FRAGMENTATION * held)
        time = step_time(request.card, step, counts, request.sharding, settings, request.optimizer)
        return Plan(request, states, step, time, allowance, held + allowance, at)

    def nearest(self, request: PlanRequest) -> Plan | None:
        """The plan that fits with the least change to the request; None if none does."""
        plan = self.plan(request)
        return plan if plan.fits else next((other for other in self._near(request) if other.fits), None)

    def checked(self, request: PlanRequest) -> Plan:
        """Plan a request that must fit.

        Raises:
            ValueError: it does not fit; the message has the reason and the nearest plan that fits.
        """
        plan = self.plan(request)
        if plan.fits:
            return plan
        nearest = self.nearest(request)
        advice = f"nearest plan that fits: {describe(nearest)}" if nearest else "no plan with up to 64 GPUs fits"
        raise ValueError(f"this plan does not fit: {plan.why_not}; {advice}")

    def _near(self, request: PlanRequest) -> Iterator[Plan]:
        """Other plans, the least change first: a smaller micro-batch, sharding, offload, more GPUs."""
        largest = largest_batch(self, request)
        if largest is not None:
            yield largest
        one = replace(request, groups=1)
        for candidate in shardings(one.sharding, one.sharding.gpus):
            yield self.plan(replace(one, sharding=candidate))
        for gpus in GPU_COUNTS:
            if gpus > one.sharding.gpus:
                for candidate in shardings(one.sharding, gpus):
                    yield self.plan(replace(one, sharding=candidate))


def shardings(
    like: Sharding, gpus: int, offloads: tuple[Offload, ...] = ("none", "optimizer", "all")
) -> Iterator[Sharding]:
    """Every stage and offload on `gpus` GPUs, fastest first: no offload before offload, low stages first."""
    for offload in offloads:
        for stage in (0, 1, 2, 3):
            useless = gpus == 1 and stage > 0 and offload == "none"
            impossible = (offload == "optimizer" and stage < 2) or (offload == "all" and stage < 3)
            if not (useless or impossible):
                yield replace(like, gpus=gpus, stage=stage, offload=offload)


def fewest_gpus(planner: Planner, request: PlanRequest, offloads: tuple[Offload, ...] = ("none",)) -> Plan | None:
    """The plan with the fewest GPUs (1, 2, 4 … 64) that fits, at the lowest such stage; None if none does."""
    for gpus in GPU_COUNTS:
        for sharding in shardings(request.sharding, gpus, offloads):
            plan = planner.plan(replace(request, sharding=sharding))
            if plan.fits:
                return plan
    return None


def largest_batch(planner: Planner, request: PlanRequest, limit: int = LARGEST) -> Plan | None:
    """The plan with the largest micro-batch that fits, at most `limit` groups; None if not even one group fits.

    Memory grows with the batch, so the largest size is found by extrapolation and bisection; each size is simulated.
    """
    limit = min(limit, request.workload.largest_batch())

    def tried(groups: int) -> Plan:
        return planner.plan(replace(request, groups=groups))

    best = tried(1)
    if not best.fits:
        return None
    too_many = limit + 1
    while best.request.groups + 1 < too_many:
        now = best.request.groups
        guess = _guess(best, tried(1)) if now > 1 else 2
        groups = min(max(now + 1, guess), too_many - 1)
        plan = tried(groups)
        if plan.fits:
            best = plan
        else:
            too_many = groups
            middle = tried((now + too_many) // 2) if too_many - now > 1 else None
            if middle is not None and middle.fits:
                best = middle
            elif middle is not None:
                too_many = middle.request.groups
    return best


def _guess(now: Plan, one: Plan) -> int:
    """Number of groups that would just fit by linear extrapolation from one group and the current number."""
    slope = (now.peak - one.peak) / (now.request.groups - one.request.groups)
    return now.request.groups + int((now.capacity - now.peak) / slope) if slope > 0 else 2 * now.request.groups


def describe(plan: Plan) -> str:
    """A short description of a plan, by its command-line options."""
    new, sharding = plan.request, plan.request.sharding
    adapters = "" if new.settings.lora_rank is None else f"--lora-r {new.settings.lora_rank} "
    words = [
        f"{adapters}--gpus {sharding.gpus} --zero {sharding.stage} --offload {sharding.offload} --groups {new.groups}"
    ]
    words.append(f"({plan.peak / GIB:.1f} GiB on each GPU")
    if plan.states.host:
        words.append(f"and {plan.states.host / GIB:.0f} GiB of host memory on each node")
    return " ".join(words) + ")"
