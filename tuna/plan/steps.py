"""The step of each method, ready to run on a model, real or fake."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tuna.compare.baseline import baseline_step_loss
from tuna.plan.settings import StepSettings
from tuna.plan.workload import share_of
from tuna_kernels import Group, PackedTree, pack_groups
from tuna_kernels.integrations.transformers import model_ranking_loss
from tuna_kernels.integrations.transformers.ranking_model import ModelRequest
from tuna_kernels.integrations.transformers.shared_keys import PromptKeys
from tuna_kernels.integrations.transformers.two_phase.loss import SCORING_ROWS, two_phase_ranking_loss
from tuna_kernels.integrations.transformers.two_phase.passes import TreeGroups
from tuna_kernels.integrations.transformers.two_phase.requests import BranchPass, KeepPass
from tuna_kernels.integrations.transformers.two_phase.schedule import Schedule, Scoring

__all__ = ["make_trainable", "prepared_step"]

LORA_TARGETS = "all-linear"
Wanted = Callable[[tuple[int, ...], int], bool]
"""Hears the kind of the pass that comes next, and how many of a kind differ; says whether this one has to run."""


def prepared_step(batch: list[Group], settings: StepSettings) -> Callable[[nn.Module, Wanted | None], None]:
    """Forward and backward of a micro-batch, as the trainer (or the baseline) runs them on a model.

    What a data loader makes on the host, the packed tree and its counts, is made here: it is never simulated.

    Returns:
        A function of the model, and of None for a real step. A `Wanted` means that tensors are fake: two-phase then
        has no scores to choose candidates by and takes all, and of passes of one kind it runs the first, beside
        which most is held, and one that adds to the gradients the first has left.
    """
    if settings.method == "baseline":
        return lambda model, wanted: _backward(baseline_step_loss(model, batch, preset=settings.preset).loss)
    tree = pack_groups(batch, share=share_of(settings.method))
    options: dict[str, Any] = {"preset": settings.preset, "counts": tree.loss_counts()}
    if settings.method != "two_phase":
        options["logits_budget"] = settings.logits_budget
        return lambda model, wanted: _backward(model_ranking_loss(model, tree, **options).loss)

    def two_phase(model: nn.Module, wanted: Wanted | None) -> None:
        if wanted is None:
            two_phase_ranking_loss(model, tree, candidates_per_pass=settings.candidates_per_pass, **options)
        else:
            _fake_two_phase(model, tree, [_lengths(group) for group in batch], settings, wanted)

    return two_phase


def make_trainable(model: nn.Module, settings: StepSettings) -> nn.Module:
    """Adapters, activation checkpointing and training mode, as settings say; used on real models too."""
    inner: Any = model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers have other names for checkpointing
        if settings.lora_rank is not None:
            from peft import LoraConfig, get_peft_model

            rank = settings.lora_rank
            adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
            inner = get_peft_model(inner, adapters)
        if settings.checkpointing:
            # Dropout is off, so there is no random state to keep; reading it would need a real generator.
            inner.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    trained: nn.Module = inner.train()
    return trained


def _fake_two_phase(
    model: nn.Module, tree: PackedTree, lengths: list[tuple[int, ...]], settings: StepSettings, wanted: Wanted
) -> None:
    """The passes of `two_phase_ranking_loss` on fake tensors."""
    with _disable_current_modes():
        groups = TreeGroups(tree)
        grad_logprobs = torch.zeros(tree.num_slots)
        scoring = Scoring(tree, groups, "auto", SCORING_ROWS * groups.largest_pass(settings.candidates_per_pass))
        schedule = Schedule(groups, [True] * tree.num_candidates, settings.candidates_per_pass)
    kept: dict[tuple[int, ...], list[PromptKeys]] = {}
    for scored in _on_host(scoring.requests(scoring.passes)):
        layout = scored.layout
        kind: tuple[int, ...] = (-1, len(layout.input_ids), len(layout.slots), len(layout.position_ids))
        if wanted(kind, 1):
            with torch.no_grad():
                scored(model)
        elif isinstance(scored, KeepPass):
            scored.prompts = [_likewise(keys) for keys in kept[kind]]
        if isinstance(scored, KeepPass):
            kept[kind] = scored.prompts
    del scored, kept  # or prompts would outlive their own passes
    number = {id(keys): g for g, keys in enumerate(scoring.prompts)}
    for request in _on_host(schedule.requests(scoring.prompts, grad_logprobs, "auto", schedule.passes)):
        kind = (len(request.layout.input_ids), len(request.layout.slots), *lengths[number[id(request.prompt)]])
        if wanted(kind, 2 if isinstance(request, BranchPass) else 1):
            (loss,) = request(model)
            _backward(loss)


def _likewise(keys: PromptKeys) -> PromptKeys:
    """Other keys and values of the same sizes."""
    return PromptKeys({layer: (torch.empty_like(k), torch.empty_like(v)) for layer, (k, v) in keys.kept.items()})


def _on_host(requests: Iterator[ModelRequest]) -> Iterator[Any]:
    """Each request, its index arithmetic done on real tensors."""
    while True:
        with _disable_current_modes():
            request = next(requests, None)
        if request is None:
            return
        yield request


def _lengths(group: Group) -> tuple[int, ...]:
    return (len(group.prompt), *(len(response) for response in group.responses))


def _backward(loss: Tensor) -> None:
    torch.autograd.backward(loss)
