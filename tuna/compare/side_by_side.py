"""Tuna compared with the baseline: the same training step both ways, how far they agree and what each takes.

`"tuna"` packs the groups into a tree and calls `model_ranking_loss`; `"baseline"` is `baseline`: k padded copies of
each prompt and full logits; `"plain tree"` is the tree in a few lines of plain torch. All are followed by the same
AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tuna.compare.agreement import Error, measure_errors
from tuna.compare.baseline import baseline_step_loss, plain_tree_loss
from tuna.compare.memory_meter import ResidentPeak, in_fresh_process, resident_peak
from tuna.models.loading import load_model
from tuna_kernels import Group, pack_groups
from tuna_kernels.integrations.transformers import model_ranking_loss
from tuna_kernels.losses import Preset
from tuna_kernels.tree import tree_tokens

__all__ = [
    "LOSSES",
    "WAYS",
    "Agreement",
    "LossSettings",
    "StepTokens",
    "Stepper",
    "Way",
    "agreement",
    "count_tokens",
    "gradients_of",
    "loss_and_gradients",
    "step_memory",
]

Way = Literal["tuna", "baseline", "plain tree"]
WAYS: tuple[Way, ...] = ("tuna", "baseline")


@dataclass(frozen=True)
class LossSettings:
    """Settings of both ways; names and defaults of `tuna.train.config.TunaConfig`."""

    preset: Preset = "released"
    margin: float = 0.1
    length_penalty: float = 1.0
    mle_weight: float = 1.0


def tuna_loss(model: nn.Module, groups: Sequence[Group], settings: LossSettings) -> Tensor:
    """Our loss of one batch of groups, packing included; scalar with gradient."""
    return model_ranking_loss(model, pack_groups(groups), **asdict(settings)).loss


def baseline_loss(model: nn.Module, groups: Sequence[Group], settings: LossSettings) -> Tensor:
    """The baseline loss of one batch of groups, padding included; scalar with gradient."""
    return baseline_step_loss(model, groups, **asdict(settings)).loss


def plain_loss(model: nn.Module, groups: Sequence[Group], settings: LossSettings) -> Tensor:
    """The plain-torch tree's loss of one batch of groups, packing included; scalar with gradient."""
    return plain_tree_loss(model, groups, **asdict(settings)).loss


LOSSES: Mapping[Way, Callable[[nn.Module, Sequence[Group], LossSettings], Tensor]] = {
    "tuna": tuna_loss,
    "baseline": baseline_loss,
    "plain tree": plain_loss,
}


@dataclass
class Stepper:
    """A training step that can be repeated: loss, backward, AdamW with learning rate 0.

    At that rate AdamW does all its arithmetic and leaves the weights as they are, so that every call does the same
    work on the same numbers. Gradients of the last call stay on the parameters.
    """

    way: Way
    model: nn.Module
    settings: LossSettings
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def __call__(self, groups: Sequence[Group]) -> Tensor:
        """One step on a batch; returns its loss, detached."""
        self.optimizer.zero_grad()
        loss = LOSSES[self.way](self.model, groups, self.settings)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def loss_and_gradients(
    way: Way, model: nn.Module, groups: Sequence[Group], settings: LossSettings
) -> dict[str, Tensor]:
    """`loss` and `gradient:PARAMETER` of one batch one way. The gradients are those on the model, not copies."""
    model.zero_grad()
    loss = LOSSES[way](model, groups, settings)
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.detach(), **gradients_of(model)}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """`gradient:PARAMETER` as it stands on the model; 0 for a parameter that took no part."""
    return {
        f"gradient:{name}": torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


@dataclass(frozen=True)
class Agreement:
    """Both ways in float32 and the baseline in float64 (`exact`), on one batch.

    `losses`: of "tuna", "baseline" and "exact". The errors have the kinds "loss" and "gradient"; `max_rel` of the
    latter is that of the worst parameter, `norm_rel` that of all parameters together.
    """

    preset: str
    losses: dict[str, float]
    tuna_to_exact: dict[str, Error]
    baseline_to_exact: dict[str, Error]
    tuna_to_baseline: dict[str, Error]


def agreement(model: nn.Module, groups: Sequence[Group], settings: LossSettings) -> Agreement:
    """Loss and all gradients of one batch both ways. Leaves `model` as it was."""
    exact = loss_and_gradients("baseline", copy.deepcopy(model).double(), groups, settings)
    baseline = loss_and_gradients("baseline", copy.deepcopy(model), groups, settings)
    tuna = loss_and_gradients("tuna", copy.deepcopy(model), groups, settings)
    return Agreement(
        preset=settings.preset,
        losses={"tuna": tuna["loss"].item(), "baseline": baseline["loss"].item(), "exact": exact["loss"].item()},
        tuna_to_exact=measure_errors(tuna, exact),
        baseline_to_exact=measure_errors(baseline, exact),
        tuna_to_baseline=measure_errors(tuna, baseline),
    )


@dataclass(frozen=True)
class StepTokens:
    """Tokens one batch takes: `tree` with every common beginning computed once, `unshared` as separate sequences,
    `padded` as k copies padded to the longest of the batch."""

    tree: int
    unshared: int
    padded: int


def count_tokens(groups: Sequence[Group]) -> StepTokens:
    """What the two ways compute for one batch."""
    lengths = [len(group.prompt) + len(response) for group in groups for response in group.responses]
    return StepTokens(int(tree_tokens(groups).sum()), sum(lengths), len(lengths) * max(lengths))


def enable_checkpointing(model: Any) -> None:
    """Activation checkpointing of a transformers model, the kind that keeps to autograd's hooks."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


def step_memory(
    way: Way,
    model: str,
    groups: Sequence[Group],
    settings: LossSettings,
    *,
    threads: int,
    checkpointed: bool = False,
) -> ResidentPeak:
    """Memory of one whole step in a fresh process: growth above weights and optimizer state, and the process in all.

    Args:
        way: whose step.
        model: a name that `tuna.models.loading.load_model` takes; loaded in float32.
        groups: the batch.
        settings: of the loss.
        threads: of the fresh process.
        checkpointed: with activation checkpointing.

    Raises:
        RuntimeError: the process failed, or died for want of memory.
    """
    plain = [
        {
            "prompt": _plain(group.prompt),
            "responses": [_plain(response) for response in group.responses],
            "scores": None if group.scores is None else [float(score) for score in group.scores],
            "ranks": None if group.ranks is None else _plain(group.ranks),
        }
        for group in groups
    ]
    arguments = {
        "way": way,
        "model": model,
        "groups": plain,
        "settings": asdict(settings),
        "checkpointed": checkpointed,
    }
    return ResidentPeak(*in_fresh_process("tuna.compare.side_by_side:measure_step", arguments, threads=threads))


def measure_step(
    way: Way, model: str, groups: list[dict[str, Any]], settings: dict[str, Any], checkpointed: bool = False
) -> ResidentPeak:
    """What `step_memory` runs in the fresh process, after a step on a few tokens that makes the optimizer's state."""
    network, _ = load_model(model)
    if checkpointed:
        enable_checkpointing(network)
    step = Stepper(way, network.train(), LossSettings(**settings))
    batch = [Group(**group) for group in groups]
    step([Group(batch[0].prompt[:8], [response[:2] for response in batch[0].responses], ranks=None)])
    step.optimizer.zero_grad()
    return resident_peak(lambda: step(batch))


def _plain(tokens: Sequence[int] | Any) -> list[int]:
    return [int(token) for token in tokens]
