"""The ranking loss in two phases: the gradient of all k candidates in the memory of a few.

    1. Score all candidates without a graph. The gradient of the loss with respect to every log-probability is a
       closed form of the scores (`losses.preset_loss`); the keys and values of each prompt are kept.
    2. Run forward and backward on `candidates_per_pass` candidates at a time, whose rows attend to the kept keys and
       values as constants, and sum the gradients of those in float32. Then run forward once through the prompt, and
       backward from that sum.

This is the chain rule in another order: exact up to rounding. The graph of at most one pass is alive at a time. The
cost is one more forward, and the last prompt token once per pass (`passes`).

Scoring takes one forward if that has at most `SCORING_ROWS` times the rows of the largest gradient pass, else
several (`schedule.Scoring`); otherwise its memory would grow with k.

Separable losses have been trained on shared prompts in this order (arXiv 2606.01143, arXiv 2602.00482); scoring
first, for a loss that couples its candidates, is gradient caching (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tuna_kernels.head.ranking_loss import RankingLossOutput, active_candidates, check_choices
from tuna_kernels.integrations.transformers.ranking_model import Carrier, carrier
from tuna_kernels.integrations.transformers.two_phase.passes import TreeGroups
from tuna_kernels.integrations.transformers.two_phase.schedule import Schedule, Scoring
from tuna_kernels.loss_counts import LossCounts
from tuna_kernels.losses import Kind, Preset, PresetSettings, preset_loss
from tuna_kernels.tree import PackedTree

__all__ = ["Backward", "TwoPhaseOutput", "largest_over_ranks", "two_phase_ranking_loss"]


SCORING_ROWS = 4
"""Most rows scored at once, as a multiple of the rows of the largest gradient pass. Without a graph a row holds one
layer's temporaries, some 10 hidden states in a Llama; forward and backward with checkpointing hold 22, plus one per
layer."""


class Backward(Protocol):
    """Runs the backward of a pass."""

    def __call__(self, loss: Tensor, last: bool) -> None:
        """Run backward from the scalar `loss`; `last`: this is the last pass of the call."""
        ...


@dataclass(frozen=True)
class TwoPhaseOutput(RankingLossOutput):
    """As `RankingLossOutput`, but detached: the gradient is already in the parameters.

    Attributes:
        passes: forward and backward passes, including those that only keep ranks in step.
        skipped: candidates skipped because none of their slots has a gradient.
        rows_alive: packed rows of the largest pass, to compare with the `rows` of the one-pass graph.
        shared_bytes: peak bytes of the prompts' keys and values and the sums of their gradients.
    """

    passes: int
    skipped: int
    rows_alive: int
    shared_bytes: int


def two_phase_ranking_loss(
    model: nn.Module | Carrier,
    tree: PackedTree,
    *,
    kind: Kind = "tuna",
    preset: Preset = "paper",
    margin: float = 0.1,
    length_penalty: float = 1.0,
    mle_weight: float = 1.0,
    counts: LossCounts | None = None,
    logits_budget: int | None = None,
    backend: str = "auto",
    candidates_per_pass: int = 1,
    skip_inactive: bool = True,
    scale: float = 1.0,
    backward: Backward | None = None,
    pass_context: Callable[[bool], AbstractContextManager[Any]] | None = None,
    before_backward: Callable[[RankingLossOutput], None] | None = None,
    most_passes: Callable[[int], int] | None = None,
) -> TwoPhaseOutput:
    """`model_ranking_loss` and its backward in one call, a few candidates at a time.

    The gradients are added to the parameters' `.grad` (or handled by `backward`); do not call
    `loss.backward()`. Prefixes beyond the prompt are shared within a pass only, whatever the tree shares.

    Requirements on an engine: `backward(loss, last)` is called several times, each time with a scalar whose forward
    just ran. It may multiply `loss` by any constant (loss scaling, accumulation), the same for all passes of
    a call; gradients must accumulate, and may be reduced over ranks when `last` is true. The value of `loss` is
    not that of the ranking loss. With DeepSpeed::

        def backward(loss, last):
            engine.set_gradient_accumulation_boundary(last and this_is_the_last_micro_batch)
            engine.backward(loss)

    Args:
        model: as in `model_ranking_loss`.
        tree: as in `model_ranking_loss`.
        kind: as in `model_ranking_loss`.
        preset: as in `model_ranking_loss`.
        margin: as in `model_ranking_loss`.
        length_penalty: as in `model_ranking_loss`.
        mle_weight: as in `model_ranking_loss`.
        counts: as in `model_ranking_loss`.
        backend: as in `model_ranking_loss`.
        logits_budget: ignored, since passes keep no logits; accepted so that both losses take the same settings.
        candidates_per_pass: candidates whose graph is alive at once, at least 1.
        skip_inactive: skip candidates none of whose log-probabilities has a gradient. Exact. Under the preset
            `released` with an MLE term there are none.
        scale: factor on the gradients, not on the loss returned; 0 runs only a pass that keeps ranks in step.
        backward: default `loss.backward()`.
        pass_context: maps whether a pass is the last to a context for its forward and backward. Under DDP:
            `lambda last: nullcontext() if last else model.no_sync()`.
        before_backward: called once with the loss and its parts, before any gradient is computed.
        most_passes: maps this rank's number of passes to the largest over all ranks that step together; ranks with
            fewer run additional passes of one token with weight 0. Called for the scoring passes, then for
            the gradient passes. Default: `largest_over_ranks` if `model` is wrapped and torch.distributed is
            initialized, else the number itself.

    Raises:
        ValueError: `candidates_per_pass` below 1; dropout in training mode (the two phases would draw different
            masks); reentrant activation checkpointing (its layers are not part of a graph); layers that share keys;
            or as `model_ranking_loss`.
        RuntimeError: gradients are disabled; or a second or forward-mode derivative, or a transform of torch.func.
    """
    check_choices(kind, preset)
    if candidates_per_pass < 1:
        raise ValueError(f"candidates_per_pass = {candidates_per_pass} must be at least 1")
    if not torch.is_grad_enabled():
        raise RuntimeError("two_phase_ranking_loss runs the backward itself, but gradients are disabled")
    if tree.num_tokens == 0:
        raise ValueError("tree holds no groups")
    carry = carrier(model)
    groups = TreeGroups(tree)
    if most_passes is None:
        most_passes = largest_over_ranks if carry is model else int
    scoring = Scoring(tree, groups, backend, SCORING_ROWS * groups.largest_pass(candidates_per_pass))
    with torch.no_grad(), _nothing_random(tree):
        logprobs = scoring.run(carry, most_passes(scoring.passes))
    dual = forward_ad.unpack_dual(logprobs)  # type: ignore[no-untyped-call]
    if torch._C._are_functorch_transforms_active() or dual.tangent is not None:
        raise RuntimeError(
            "two_phase_ranking_loss runs the backward itself and supports neither forward mode nor transforms of "
            'torch.func; use model_ranking_loss, for forward mode with backend="reference"'
        )
    tree = tree.to(logprobs.device)
    settings = PresetSettings(preset, margin, length_penalty, mle_weight)
    offsets = tree.candidate_offsets, tree.ranks, tree.group_offsets
    result = preset_loss(logprobs, *offsets, settings, counts or tree.loss_counts())
    active = active_candidates(result.grad_logprobs, tree)
    output = RankingLossOutput(
        loss=(result.ranking + mle_weight * result.mle).to(logprobs.dtype),
        ranking=result.ranking.to(logprobs.dtype),
        mle=result.mle.to(logprobs.dtype),
        scores=result.scores,
        logprobs=logprobs,
        active=active,
    )
    if before_backward is not None:
        before_backward(output)
    taken = active.tolist() if skip_inactive else [True] * tree.num_candidates
    schedule = Schedule(groups, taken if scale else [False] * len(taken), candidates_per_pass)
    passes = most_passes(max(schedule.passes, 1))
    grad_logprobs = result.grad_logprobs.to(logprobs.dtype) * scale
    requests = schedule.requests(scoring.prompts, grad_logprobs, backend, passes)
    for number, request in enumerate(requests, start=1):
        last = number == passes
        with pass_context(last) if pass_context else nullcontext():
            (loss,) = carry(request)
            (backward or _plain_backward)(loss, last)
    return TwoPhaseOutput(
        **vars(output),
        passes=passes,
        skipped=taken.count(False),
        rows_alive=schedule.rows_alive,
        shared_bytes=schedule.shared_bytes,
    )


def largest_over_ranks(number: int) -> int:
    """The largest `number` over all ranks of the default process group; `number` itself without one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def _plain_backward(loss: Tensor, last: bool) -> None:
    torch.autograd.backward(loss)


class _nothing_random:
    """Rejects a scoring pass that drew random numbers: the gradient passes would draw others."""

    def __init__(self, tree: PackedTree) -> None:
        self._device = tree.input_ids.device

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return states + ([torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else [])

    def __enter__(self) -> None:
        self._before = self._states()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None and not all(map(torch.equal, self._before, self._states())):
            raise ValueError(
                "the model draws random numbers in its forward (dropout, layer drop or router noise in training "
                "mode): scores and gradients would use different ones; switch it off (model.eval() if the model draws "
                "even at rate 0) or use the one-pass loss"
            )
