"""The step of each method, to be run on a real or fake model."""

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
"""Called with the kind of the next pass and how many passes of a kind differ; returns whether the pass must run."""


def prepared_step(batch: list[Group], settings: StepSettings) -> Callable[[nn.Module, Wanted | None], None]:
    """Forward and backward of a micro-batch, as the trainer (or the baseline) runs them on a model.

    The packed tree and its counts, which a data loader makes on the host, are made here and never simulated.

    Returns:
        A function of the model and of None for a real step. With a `Wanted`, tensors are fake: two phases then have
        no scores to select candidates by and use all of them, and of passes of one kind run the first, during
        which the most memory is held, and one that adds to the gradients left by the first.
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
    """Apply adapters, activation checkpointing and training mode by the settings; used on real models too."""
    inner: Any = model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers use other names for checkpointing
        if settings.lora_rank is not None:
            from peft import LoraConfig, get_peft_model

            rank = settings.lora_rank
            adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
            inner = get_peft_model(inner, adapters)
        if settings.checkpointing:
            # Dropout is off, so no random state must be kept; reading it would need a real generator.
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
    del scored, kept  # otherwise prompts would outlive their passes
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
    """The requests, with their index arithmetic done on real tensors."""
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
