"""Registration with ``torch.library``: op, fake implementation, autograd. The arithmetic is in ``backends``.

Ops take flat tensors, numbers and flags, and return fixed tuples, so ``torch.compile(fullgraph=True)``,
``opcheck``, autocast and ``torch.export`` see them. What is not wanted comes back empty. The ``reference`` backend
is plain autograd and has no op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from tuna_kernels import derivatives
from tuna_kernels.arguments import compute_dtype, dense_rows
from tuna_kernels.head import tiled_linear, tiled_ranking
from tuna_kernels.head.backends import head_backend
from tuna_kernels.head.tiled_linear import LinearCall, Saved
from tuna_kernels.head.tiled_ranking import Candidates
from tuna_kernels.loss_counts import LossCounts
from tuna_kernels.losses import Preset, PresetSettings, Reduction, tuna_hinge

P = ParamSpec("P")
R = TypeVar("R")
FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
ElevenTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _kernel(function: Callable[P, R]) -> Callable[P, R]:
    """What holds for every op: rows are dense, and autocast does not reach into it, where it would turn our float32
    products into half precision."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        dense: Any = [dense_rows(a) if isinstance(a, Tensor) else a for a in args]
        with torch.autocast(device, enabled=False):
            return function(*dense, **kwargs)

    return inner


def _five_needed(ctx: Any) -> list[bool]:
    """Which of hidden, weight, bias, low_rank_hidden, low_rank_weight (the first five inputs) need a gradient."""
    return list(ctx.needs_input_grad[:5])


def _or_none(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [g if wanted else None for g, wanted in zip(gradients, needs, strict=True)]


# --- linear_logprobs ------------------------------------------------------------------------------------------


@torch.library.custom_op("tuna_kernels::linear_logprobs", mutates_args=())
@_kernel
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_hidden: Tensor | None,
    low_rank_weight: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    want_entropy: bool,
    keep_unit: bool,
    backend: str,
    main_grad: Tensor | None = None,
    filter_eps: float = 0.0,
) -> FiveTensors:
    """`tiled_linear.forward`; ``main_grad`` and ``filter_eps`` serve the backward."""
    call = LinearCall(hidden, weight, bias, low_rank_hidden, low_rank_weight, logit_scale, softcap)
    return tiled_linear.forward(
        head_backend(backend), call, targets, rows, ignore_index, want_entropy=want_entropy, want_unit=keep_unit
    )


@linear_logprobs.register_fake
def _(hidden: Tensor, *rest: Any) -> FiveTensors:
    targets, want_entropy, keep_unit = rest[4], rest[9], rest[10]
    slots = targets.shape[0]
    new = partial(hidden.new_empty, dtype=_compute_of(hidden, *rest[:4]))
    unit_rows = torch.sym_min(hidden.shape[0], slots) if keep_unit else 0  # type: ignore[no-untyped-call]
    entropy = new(slots if want_entropy else 0)
    return new(slots), new(slots), entropy, new(unit_rows, hidden.shape[1]), new(3, slots)


@torch.library.custom_op("tuna_kernels::linear_logprobs_backward", mutates_args=())
@_kernel
def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_hidden: Tensor | None,
    low_rank_weight: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    entropy: Tensor,
    unit: Tensor,
    state: Tensor,
    grad_logprobs: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    needs: Sequence[bool],
    backend: str,
    filter_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = LinearCall(hidden, weight, bias, low_rank_hidden, low_rank_weight, logit_scale, softcap)
    saved = Saved(entropy, unit, state, grad_logprobs, grad_lse, grad_entropy)
    a, b, c, d, e = needs
    return tiled_linear.backward(
        head_backend(backend), call, targets, rows, ignore_index, saved, (a, b, c, d, e), filter_eps=filter_eps
    )


@torch.library.custom_op("tuna_kernels::linear_logprobs_backward_into", mutates_args=("main_grad",))
@_kernel
def linear_logprobs_backward_into(
    main_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_hidden: Tensor | None,
    low_rank_weight: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    entropy: Tensor,
    unit: Tensor,
    state: Tensor,
    grad_logprobs: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    needs: Sequence[bool],
    backend: str,
    filter_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``linear_logprobs_backward`` that adds the weight's gradient to ``main_grad`` and returns an empty one."""
    call = LinearCall(hidden, weight, bias, low_rank_hidden, low_rank_weight, logit_scale, softcap)
    saved = Saved(entropy, unit, state, grad_logprobs, grad_lse, grad_entropy)
    a, b, c, d, e = needs
    return tiled_linear.backward(
        head_backend(backend), call, targets, rows, ignore_index, saved, (a, b, c, d, e),
        filter_eps=filter_eps, main_grad=main_grad,
    )  # fmt: skip


def _compute_of(*inputs: Tensor | None) -> torch.dtype:
    """The type a call over these computes in."""
    return compute_dtype(*(t.dtype for t in inputs if t is not None))


def _fake_gradients(sources: Sequence[Tensor | None], needs: Sequence[bool], dtype: torch.dtype | None) -> FiveTensors:
    first = sources[0]
    if first is None:
        raise TypeError("hidden is never None")
    made = [
        first.new_empty(0, dtype=dtype) if t is None or not wanted else t.new_empty(t.shape, dtype=dtype)
        for t, wanted in zip(sources, needs, strict=True)
    ]
    return made[0], made[1], made[2], made[3], made[4]


@linear_logprobs_backward.register_fake
def _(*arguments: Any) -> FiveTensors:
    return _fake_gradients(arguments[:5], needs=arguments[16], dtype=None)


@linear_logprobs_backward_into.register_fake
def _(main_grad: Tensor, *arguments: Any) -> FiveTensors:
    hidden, _, *others = arguments[16]
    return _fake_gradients(arguments[:5], needs=[hidden, False, *others], dtype=None)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[2:])
    ctx.settings = inputs[7], inputs[8], inputs[9], inputs[12], inputs[14]
    ctx.main_grad = inputs[13]  # not saved: other micro-batches add to it before this backward runs


def _linear_gradients(ctx: Any, saved: Sequence[Any], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = _five_needed(ctx)
    ignore_index, logit_scale, softcap, backend, filter_eps = ctx.settings
    arguments = (*saved, *grads[:3], ignore_index, logit_scale, softcap, needs, backend, filter_eps)
    if ctx.main_grad is None or not needs[1]:
        gradients = torch.ops.tuna_kernels.linear_logprobs_backward(*arguments)
    else:
        gradients = torch.ops.tuna_kernels.linear_logprobs_backward_into(ctx.main_grad, *arguments)
        needs = [needs[0], False, *needs[2:]]
    return (*_or_none(gradients, needs), *[None] * 10)


derivatives.register(linear_logprobs, setup_context=_save_linear, backward=_linear_gradients)
derivatives.register(linear_logprobs_backward)
derivatives.register(linear_logprobs_backward_into)


# --- selective_logprobs ---------------------------------------------------------------------------------------


@torch.library.custom_op("tuna_kernels::selective_logprobs", mutates_args=())
@_kernel
def selective_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    ignore_index: int,
    backend: str,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, maximum, log_sum (`tiled_selective.forward`)."""
    forward = head_backend(backend).selective_forward
    return forward(logits, targets, temperature, ignore_index, compute_dtype(logits.dtype))


@selective_logprobs.register_fake
def _(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    new = partial(logits.new_empty, dtype=compute_dtype(logits.dtype))
    return new(targets.shape), new(targets.shape), new(targets.shape)


@torch.library.custom_op("tuna_kernels::selective_logprobs_backward", mutates_args=())
@_kernel
def selective_logprobs_backward(
    grad_logprobs: Tensor,
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    temperature: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    gradient = logits.new_empty(logits.shape)
    backward = head_backend(backend).selective_backward
    backward(grad_logprobs, logits, targets, maximum, log_sum, temperature, ignore_index, gradient)
    return gradient


@selective_logprobs_backward.register_fake
def _(grad_logprobs: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("tuna_kernels::selective_logprobs_backward_", mutates_args=("logits",))
@_kernel
def selective_logprobs_backward_(
    grad_logprobs: Tensor,
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    temperature: float,
    ignore_index: int,
    backend: str,
) -> None:
    """``logits`` become their gradient."""
    backward = head_backend(backend).selective_backward
    backward(grad_logprobs, logits, targets, maximum, log_sum, temperature, ignore_index, logits)


@selective_logprobs_backward_.register_fake
def _(*_: Any) -> None:
    return None


def _save_selective(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *output[1:])
    ctx.settings, ctx.inplace = inputs[2:5], inputs[5]


def _selective_gradients(
    ctx: Any, saved: Sequence[Any], grad_logprobs: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    logits, *of_softmax = saved
    if ctx.inplace:
        gradient = logits.detach()
        torch.ops.tuna_kernels.selective_logprobs_backward_(grad_logprobs, gradient, *of_softmax, *ctx.settings)
        return gradient, *[None] * 5
    gradient = torch.ops.tuna_kernels.selective_logprobs_backward(grad_logprobs, logits, *of_softmax, *ctx.settings)
    return gradient, *[None] * 5


derivatives.register(selective_logprobs, setup_context=_save_selective, backward=_selective_gradients)
derivatives.register(selective_logprobs_backward)
derivatives.register(selective_logprobs_backward_)


# --- ranking_loss ---------------------------------------------------------------------------------------------


@torch.library.custom_op("tuna_kernels::ranking_loss", mutates_args=())
@_kernel
def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    group_offsets: Tensor,
    margin: float,
    reduction: str,
    groups: int,
    pairs_by_lag: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """``groups`` < 0: denominators are those of the ranks at hand."""
    if groups < 0:
        counts = LossCounts.from_ranks(ranks, group_offsets, 0)
        groups, pairs_by_lag = counts.groups, counts.pairs_by_lag
    kind: Reduction = "mean_groups" if reduction == "mean_groups" else "mean_per_lag"
    loss, gradient = tuna_hinge(
        scores, ranks, group_offsets, margin=margin, reduction=kind, groups=groups, pairs_by_lag=pairs_by_lag
    )
    return loss.to(compute_dtype(scores.dtype)), gradient.to(scores.dtype)


@ranking_loss.register_fake
def _(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return scores.new_empty((), dtype=compute_dtype(scores.dtype)), scores.new_empty(scores.shape)


def _save_ranking(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.save_for_forward(output[1])


def _ranking_gradients(
    ctx: Any, saved: Sequence[Any], grad_loss: Tensor | None, _gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The loss is piecewise linear: its gradient is constant in the scores, and linear in ``grad_loss``."""
    (gradient,) = saved
    return (None if grad_loss is None else (gradient * grad_loss).to(gradient.dtype), *[None] * 6)


def _ranking_tangents(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, Tensor]:
    (gradient,) = ctx.saved_tensors
    return (gradient * tangent).sum(dtype=compute_dtype(gradient.dtype)), torch.zeros_like(gradient)


derivatives.register(
    ranking_loss, setup_context=_save_ranking, backward=_ranking_gradients, jvp=_ranking_tangents, twice=True
)


# --- linear_ranking_loss --------------------------------------------------------------------------------------


@torch.library.custom_op("tuna_kernels::linear_ranking_loss", mutates_args=())
@_kernel
def linear_ranking_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_hidden: Tensor | None,
    low_rank_weight: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    candidate_offsets: Tensor,
    ranks: Tensor,
    group_offsets: Tensor,
    logit_scale: float,
    softcap: float | None,
    preset: str,
    margin: float,
    length_penalty: float,
    mle_weight: float,
    groups: int,
    pairs_by_lag: Sequence[int],
    tokens: int,
    logits_budget: int,
    needs: Sequence[bool],
    backend: str,
) -> ElevenTensors:
    """loss, ranking, mle, scores, logprobs, dL/dlogprob, and the five gradients for a ``grad_loss`` of 1.

    The gradients stay in the compute type until the true ``grad_loss`` is known, so that scaling a loss up against
    underflow in float16 still helps. ``groups`` < 0: denominators are those of the ranks at hand.
    """
    call = LinearCall(hidden, weight, bias, low_rank_hidden, low_rank_weight, logit_scale, softcap)
    counts = LossCounts(groups, tuple(pairs_by_lag), tokens)
    if groups < 0:
        counts = LossCounts.from_ranks(ranks, group_offsets, targets.numel())
    kind: Preset = "paper" if preset == "paper" else "released"
    a, b, c, d, e = needs
    result = tiled_ranking.linear_ranking(
        head_backend(backend),
        call,
        Candidates(rows, targets, candidate_offsets, ranks, group_offsets),
        PresetSettings(kind, margin, length_penalty, mle_weight),
        counts,
        (a, b, c, d, e),
        logits_budget,
    )
    made = result.gradients
    ready = (made.rows, made.weight, made.bias, made.low_rank_rows, made.low_rank_weight)
    u, v, x, y, z = (result.logprobs.new_empty(0) if t is None else t for t in ready)
    loss, ranking_, mle = (t.to(call.compute) for t in (result.total(mle_weight), result.ranking, result.mle))
    return loss, ranking_, mle, result.scores, result.logprobs, result.grad_logprobs, u, v, x, y, z


@linear_ranking_loss.register_fake
def _(*arguments: Any) -> ElevenTensors:
    hidden, targets, ranks = arguments[0], arguments[6], arguments[8]
    dtype = _compute_of(*arguments[:5])
    a, b, c = (hidden.new_empty((), dtype=dtype) for _ in range(3))
    d, e = (hidden.new_empty(targets.shape, dtype=dtype) for _ in range(2))
    scores = hidden.new_empty(ranks.shape, dtype=dtype)
    return a, b, c, scores, d, e, *_fake_gradients(arguments[:5], needs=arguments[-2], dtype=dtype)


class _Ready:
    """Gradients made in the forward, handed over once: whoever takes them owns them and may scale in place."""

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        self._gradients: list[Tensor] | None = [g.detach() for g in gradients]

    def take(self, needs: Sequence[bool]) -> list[Tensor] | None:
        """None where they were taken, or one that is needed was not made: inside `torch.func` the caller of the loss
        may not see what is to be differentiated."""
        gradients, self._gradients = self._gradients, None
        if gradients is None or any(wanted and not g.numel() for g, wanted in zip(gradients, needs, strict=True)):
            return None
        return gradients


def _save_linear_ranking(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[10:]
    ctx.ready = _Ready(output[6:])


def _linear_ranking_gradients(
    ctx: Any, saved: Sequence[Any], grad_loss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The first backward takes the gradients that lie ready; a later one (retain_graph) makes them again, by the same
    call of the same op: a second backward gives the bits of the first."""
    none: list[Tensor | None] = [None] * 17
    if grad_loss is None:
        return (*[None] * 5, *none)
    needs = _five_needed(ctx)
    call = saved[:5]
    ready = ctx.ready.take(needs) or _made_again(ctx, saved, needs)
    if type(grad_loss) not in (Tensor, FakeTensor) or is_functorch_wrapped_tensor(grad_loss) or _has_tangent(grad_loss):
        # being traced, the graph's compiler decides what happens in place; under vmap there are several scales
        ready = [g * grad_loss for g in ready]
    elif (
        type(grad_loss) is FakeTensor or grad_loss.device.type != "cpu" or grad_loss.item() != 1.0
    ):  # free to read on CPU alone
        ready = [g.mul_(grad_loss) for g in ready]
    gradients = [
        g if t is None or not wanted else g.to(t.dtype) for g, t, wanted in zip(ready, call, needs, strict=True)
    ]
    return (*_or_none(gradients, needs), *none)


def _made_again(ctx: Any, saved: Sequence[Any], needs: list[bool]) -> list[Tensor]:
    *settings, _, backend = ctx.settings
    return list(torch.ops.tuna_kernels.linear_ranking_loss(*saved, *settings, needs, backend)[6:])


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


derivatives.register(linear_ranking_loss, setup_context=_save_linear_ranking, backward=_linear_ranking_gradients)
