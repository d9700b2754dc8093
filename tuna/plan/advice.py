"""Advice from a plan: the training command, and adapters if full fine-tuning does not fit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

import torch

from tuna.plan.planner import Plan, Planner
from tuna.plan.settings import PlanRequest

__all__ = ["LORA_RANK", "adapters", "train_command"]

LORA_RANK = 16
PRECISIONS = {torch.bfloat16: ("bf16", "bfloat16"), torch.float16: ("fp16", "float16")}
OPTIMIZERS = {"kahan": "adamw_kahan", "adamw8bit": "adamw_bnb_8bit"}
CONFIGS = {"none": "zero{stage}.yaml", "optimizer": "zero{stage}_offload.yaml", "all": "zero3_offload_all.yaml"}


def train_command(plan: Plan, model: str | None, *, data: str | None, template: str | None, max_length: int) -> str:
    """`tuna train` with the settings of a plan; words in capitals stand for what the plan does not know.

    Args:
        plan: a plan that fits.
        model: the model's name as given by the user.
        data, template, max_length: of real records, if the plan was made for them.
    """
    request, settings, sharding = plan.request, plan.request.settings, plan.request.sharding
    workload = request.workload
    words = [*_launcher(plan), "train", "--model", model or "MODEL", "--data", data or "DATA", "--output", "FOLDER"]
    if data is not None and template is not None:
        words += ["--template", template]
    longest = max_length if data is not None else workload.prompt_tokens + workload.response_tokens
    words += ["--max-length", str(longest), "--groups", str(request.groups)]
    if settings.lora_rank is not None:
        words += ["--lora-r", str(settings.lora_rank)]
    changes = _changes(request)
    if settings.dtype in PRECISIONS and (
        settings.lora_rank is not None or request.optimizer == "kahan" or sharding.stage
    ):
        words += ["--dtype", PRECISIONS[settings.dtype][1]]
    if settings.method == "unshared":
        words += ["--share", "none"]
    if sharding.stage:
        stage = max(sharding.stage, 2) if sharding.offload == "optimizer" else sharding.stage
        words += ["--deepspeed", "configs/deepspeed/" + CONFIGS[sharding.offload].format(stage=stage)]
    for change in changes:
        words += ["--set", change]
    return shlex.join(words)


def adapters(planner: Planner, request: PlanRequest) -> Plan | None:
    """A plan for adapters on the same GPUs without offload, if it fits and `request` is for full fine-tuning."""
    if request.settings.lora_rank is not None:
        return None
    for groups in sorted({request.groups, 1}, reverse=True):
        for stage in dict.fromkeys((0, 3 if request.sharding.gpus > 1 else 0)):
            asked = replace(
                request,
                groups=groups,
                optimizer="adamw",
                settings=replace(request.settings, lora_rank=LORA_RANK),
                sharding=replace(request.sharding, stage=stage, offload="none"),
            )
            plan = planner.plan(asked)
            if plan.fits:
                return plan
    return None


def _launcher(plan: Plan) -> Sequence[str]:
    sharding = plan.request.sharding
    if sharding.gpus == 1:
        return ["tuna"]
    each = min(sharding.gpus, sharding.gpus_per_node)
    nodes = -(-sharding.gpus // sharding.gpus_per_node)
    return ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc_per_node", str(each), "-m", "tuna"]


def _changes(request: PlanRequest) -> list[str]:
    settings, changes = request.settings, []
    if settings.dtype in PRECISIONS and request.optimizer != "kahan":
        changes.append(f"{PRECISIONS[settings.dtype][0]}=true")
    if request.optimizer in OPTIMIZERS:
        changes.append(f"optim={OPTIMIZERS[request.optimizer]}")
    if settings.checkpointing:
        changes.append("gradient_checkpointing=true")
    if settings.method == "two_phase":
        changes.append("memory=two_phase")
        if settings.candidates_per_pass != 1:
            changes.append(f"candidates_per_pass={settings.candidates_per_pass}")
    elif settings.method in ("one_pass", "unshared"):
        changes.append("memory=one_pass")
    return changes
