"""Registration with `torch.library`: op, fake implementation, autograd. No arithmetic here.

Ops take flat tensors, numbers and flags, and return fixed tuples, for `torch.compile(fullgraph=True)`,
`opcheck`, autocast and `torch.export`. Outputs that were not requested are empty. The `reference` backend
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
from tuna_kernels.arguments import compute_dtype, dense_rows, register_fake
from tuna_kernels.head import tiled_linear, tiled_ranking
from tuna_kernels.head.backends import head_backend
from tuna_kernels.head.tiled_linear import InputGradients, LinearCall, LinearResult, Needs, Saved
from tuna_kernels.head.tiled_ranking import Candidates, RankingResult
from tuna_kernels.head.tiled_selective import SelectiveResult
from tuna_kernels.loss_counts import LossCounts
from tuna_kernels.losses import Preset, PresetSettings, Reduction, tuna_hinge

P = ParamSpec("P")
R = TypeVar("R")
FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
ElevenTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Wrapper of every op: makes rows dense, and disables autocast, which would turn our float32 products into half
    precision."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        dense: Any = [dense_rows(a) if isinstance(a, Tensor) else a for a in args]
        with torch.autocast(device, enabled=False):
            return function(*dense, **kwargs)

    return inner


def _call_of(given: Any) -> LinearCall:
    """The `LinearCall` in an op's first arguments."""
    return LinearCall(*given[: len(LinearCall._fields)])


def _needs(ctx: Any) -> Needs:
    return Needs(*(getattr(ctx.needs, name) for name in Needs._fields))


def _by_name(gradients: Sequence[Tensor], needs: Needs) -> dict[str, Tensor | None]:
    return {name: g for name, g, wanted in zip(Needs._fields, gradients, needs, strict=True) if wanted}


# --- linear_logprobs ------------------------------------------------------------------------------------------


@torch.library.custom_op("tuna_kernels::linear_logprobs", mutates_args=())
@_kernel
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_hidden: Tensor | None,
    low_rank_weight: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    targets: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    want_entropy: bool,
    keep_unit: bool,
    backend: str,
    main_grad: Tensor | None = None,
    filter_eps: float = 0.0,
) -> FiveTensors:
    """`tiled_linear.forward`; `main_grad` and `filter_eps` are for the backward."""
    call = LinearCall(hidden, weight, bias, low_rank_hidden, low_rank_weight, logit_scale, softcap)
    return tiled_linear.forward(
        head_backend(backend), call, targets, rows, ignore_index, want_entropy=want_entropy, want_unit=keep_unit
    )


@register_fake(linear_logprobs)
def _(given: Any) -> LinearResult:
    hidden, slots = given.hidden, given.targets.shape[0]
    new = partial(hidden.new_empty, dtype=_call_of(given).compute)
    unit_rows = torch.sym_min(hidden.shape[0], slots) if given.keep_unit else 0  # type: ignore[no-untyped-call]
    return LinearResult(
        logprobs=new(slots),
        lse=new(slots),
        entropy=new(slots if given.want_entropy else 0),
        unit=new(unit_rows, hidden.shape[1]),
        state=new(3, slots),
    )


@torch.library.custom_op("tuna_kernels::linear_logprobs_backward", mutates_args=())
@_kernel
def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_hidden: Tensor | None,
    low_rank_weight: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    targets: Tensor,
    rows: Tensor | None,
    entropy: Tensor,
    unit: Tensor,
    state: Tensor,
    grad_logprobs: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    ignore_index: int,
    needs: Sequence[bool],
    backend: str,
    filter_eps: float = 0.0,
) -> FiveTensors:
    call = LinearCall(hidden, weight, bias, low_rank_hidden, low_rank_weight, logit_scale, softcap)
    saved = Saved(entropy, unit, state, grad_logprobs, grad_lse, grad_entropy)
    return tiled_linear.backward(
        head_backend(backend), call, targets, rows, ignore_index, saved, Needs(*needs), filter_eps=filter_eps
    )


@torch.library.custom_op("tuna_kernels::linear_logprobs_backward_into", mutates_args=("main_grad",))
@_kernel
def linear_logprobs_backward_into(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_hidden: Tensor | None,
    low_rank_weight: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    targets: Tensor,
    rows: Tensor | None,
    entropy: Tensor,
    unit: Tensor,
    state: Tensor,
    grad_logprobs: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    ignore_index: int,
    needs: Sequence[bool],
    backend: str,
    filter_eps: float,
    main_grad: Tensor,
) -> FiveTensors:
    """`linear_logprobs_backward` that adds the weight's gradient to `main_grad` and returns an empty one."""
    call = LinearCall(hidden, weight, bias, low_rank_hidden, low_rank_weight, logit_scale, softcap)
    saved = Saved(entropy, unit, state, grad_logprobs, grad_lse, grad_entropy)
    return tiled_linear.backward(
        head_backend(backend), call, targets, rows, ignore_index, saved, Needs(*needs),
        filter_eps=filter_eps, main_grad=main_grad,
    )  # fmt: skip


def _fake_gradients(call: LinearCall, needs: Needs, dtype: torch.dtype | None) -> InputGradients:
    none, pairs = call.hidden.new_empty, zip(call.tensors, needs, strict=True)
    return InputGradients(
        *(none(0, dtype=dtype) if t is None or not wanted else t.new_empty(t.shape, dtype=dtype) for t, wanted in pairs)
    )


@register_fake(linear_logprobs_backward)
def _(given: Any) -> InputGradients:
    return _fake_gradients(_call_of(given), Needs(*given.needs), dtype=None)


@register_fake(linear_logprobs_backward_into)
def _(given: Any) -> InputGradients:
    return _fake_gradients(_call_of(given), Needs(*given.needs)._replace(weight=False), dtype=None)


def _save_linear(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    call, result = _call_of(inputs), LinearResult(*output)
    ctx.save_for_backward(*call.tensors, inputs.targets, inputs.rows, result.entropy, result.unit, result.state)
    settings = ("logit_scale", "softcap", "ignore_index", "backend", "filter_eps")
    ctx.settings = {name: getattr(inputs, name) for name in settings}
    ctx.main_grad = inputs.main_grad  # not saved: other micro-batches add to it before this backward runs


def _linear_gradients(
    ctx: Any,
    saved: Sequence[Any],
    grad_logprobs: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    *_: Tensor | None,
) -> dict[str, Tensor | None]:
    needs = _needs(ctx)
    *tensors, targets, rows, entropy, unit, state = saved
    arguments: dict[str, Any] = {
        **dict(zip(Needs._fields, tensors, strict=True)),
        **ctx.settings,
        "targets": targets,
        "rows": rows,
        "entropy": entropy,
        "unit": unit,
        "state": state,
        "grad_logprobs": grad_logprobs,
        "grad_lse": grad_lse,
        "grad_entropy": grad_entropy,
        "needs": list(needs),
    }
    if ctx.main_grad is None or not needs.weight:
        gradients = torch.ops.tuna_kernels.linear_logprobs_backward(**arguments)
    else:
        gradients = torch.ops.tuna_kernels.linear_logprobs_backward_into(**arguments, main_grad=ctx.main_grad)
        needs = needs._replace(weight=False)
    return _by_name(gradients, needs)


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
    forward = head_backend(backend).selective_forward
    return forward(logits, targets, temperature, ignore_index, compute_dtype(logits.dtype))


@register_fake(selective_logprobs)
def _(given: Any) -> SelectiveResult:
    new = partial(given.logits.new_empty, given.targets.shape, dtype=compute_dtype(given.logits.dtype))
    return SelectiveResult(new(), new(), new())


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


@register_fake(selective_logprobs_backward)
def _(given: Any) -> Tensor:
    fake: Tensor = given.logits.new_empty(given.logits.shape)
    return fake


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
    """`logits` become their gradient."""
    backward = head_backend(backend).selective_backward
    backward(grad_logprobs, logits, targets, maximum, log_sum, temperature, ignore_index, logits)


@register_fake(selective_logprobs_backward_)
def _(given: Any) -> None:
    return None


def _save_selective(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    result = SelectiveResult(*output)
    ctx.save_for_backward(inputs.logits, inputs.targets, result.maximum, result.log_sum)
    ctx.settings = {name: getattr(inputs, name) for name in ("temperature", "ignore_index", "backend")}
    ctx.inplace = inputs.inplace_backward


def _selective_gradients(ctx: Any, saved: Sequence[Any], grad_logprobs: Tensor, *_: Tensor) -> dict[str, Tensor | None]:
    logits, targets, maximum, log_sum = saved
    logits = logits.detach() if ctx.inplace else logits
    arguments: dict[str, Any] = {"targets": targets, "maximum": maximum, "log_sum": log_sum, **ctx.settings}
    if ctx.inplace:
        torch.ops.tuna_kernels.selective_logprobs_backward_(grad_logprobs, logits, **arguments)
        return {"logits": logits}
    return {"logits": torch.ops.tuna_kernels.selective_logprobs_backward(grad_logprobs, logits, **arguments)}


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
    """`groups` < 0: count the denominators from the given ranks."""
    if groups < 0:
        counts = LossCounts.from_ranks(ranks, group_offsets, 0)
        groups, pairs_by_lag = counts.groups, counts.pairs_by_lag
    kind: Reduction = "mean_groups" if reduction == "mean_groups" else "mean_per_lag"
    loss, gradient = tuna_hinge(
        scores, ranks, group_offsets, margin=margin, reduction=kind, groups=groups, pairs_by_lag=pairs_by_lag
    )
    return loss.to(compute_dtype(scores.dtype)), gradient.to(scores.dtype)


@register_fake(ranking_loss)
def _(given: Any) -> tuple[Tensor, Tensor]:
    scores = given.scores
    return scores.new_empty((), dtype=compute_dtype(scores.dtype)), scores.new_empty(scores.shape)


def _save_ranking(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.save_for_forward(output[1])


def _ranking_gradients(
    ctx: Any, saved: Sequence[Any], grad_loss: Tensor | None, _gradient: Tensor | None
) -> dict[str, Tensor | None]:
    """The loss is piecewise linear: its gradient is constant in the scores, and linear in `grad_loss`."""
    (gradient,) = saved
    return {} if grad_loss is None else {"scores": (gradient * grad_loss).to(gradient.dtype)}


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
    logit_scale: float,
    softcap: float | None,
    rows: Tensor,
    targets: Tensor,
    candidate_offsets: Tensor,
    ranks: Tensor,
    group_offsets: Tensor,
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
    """`tiled_ranking.linear_ranking`. Its gradients stay in the compute type until `grad_loss` is known, so that loss
    scaling against float16 underflow still works. `groups` < 0: count the denominators from the given ranks."""
    call = LinearCall(hidden, weight, bias, low_rank_hidden, low_rank_weight, logit_scale, softcap)
    counts = LossCounts(groups, tuple(pairs_by_lag), tokens)
    if groups < 0:
        counts = LossCounts.from_ranks(ranks, group_offsets, targets.numel())
    kind: Preset = "paper" if preset == "paper" else "released"
    return tiled_ranking.linear_ranking(
        head_backend(backend),
        call,
        Candidates(rows, targets, candidate_offsets, ranks, group_offsets),
        PresetSettings(kind, margin, length_penalty, mle_weight),
        counts,
        Needs(*needs),
        logits_budget,
    )


@register_fake(linear_ranking_loss)
def _(given: Any) -> RankingResult:
    call = _call_of(given)
    new = partial(call.hidden.new_empty, dtype=call.compute)
    return RankingResult(
        loss=new(()),
        ranking=new(()),
        mle=new(()),
        scores=new(given.ranks.shape),
        logprobs=new(given.targets.shape),
        grad_logprobs=new(given.targets.shape),
        **{f"grad_{name}": g for name, g in _fake_gradients(call, Needs(*given.needs), call.compute)._asdict().items()},
    )


class _Ready:
    """Gradients computed in the forward. They can be taken once; the caller owns them and may scale them in place."""

    def __init__(self, gradients: InputGradients) -> None:
        self._gradients: list[Tensor] | None = [g.detach() for g in gradients]

    def take(self, needs: Needs) -> list[Tensor] | None:
        """The gradients; None if already taken or if a needed one was not computed (inside `torch.func` the caller of
        the loss may not see what is differentiated)."""
        gradients, self._gradients = self._gradients, None
        if gradients is None or any(wanted and not g.numel() for g, wanted in zip(gradients, needs, strict=True)):
            return None
        return gradients


def _save_linear_ranking(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    named = inputs._asdict()
    ctx.tensors = [name for name, x in named.items() if isinstance(x, Tensor)]
    ctx.save_for_backward(*(named[name] for name in ctx.tensors))
    ctx.settings = {name: x for name, x in named.items() if name not in ctx.tensors}
    ctx.ready = _Ready(RankingResult(*output).gradients)


def _linear_ranking_gradients(
    ctx: Any, saved: Sequence[Any], grad_loss: Tensor | None, *_: Tensor | None
) -> dict[str, Tensor | None]:
    """The first backward takes the gradients of the forward; a later one (retain_graph) computes them again by the
    same call of the same op, so that it gives the same bits."""
    if grad_loss is None:
        return {}
    needs, inputs = _needs(ctx), dict(zip(ctx.tensors, saved, strict=True))
    ready = ctx.ready.take(needs)
    if ready is None:
        arguments = {**ctx.settings, **inputs, "needs": list(needs)}
        ready = list(RankingResult(*torch.ops.tuna_kernels.linear_ranking_loss(**arguments)).gradients)
    is_fake = type(grad_loss) is FakeTensor
    if not (type(grad_loss) is Tensor or is_fake) or is_functorch_wrapped_tensor(grad_loss) or _has_tangent(grad_loss):
        # when traced, the compiler decides what is done in place; under vmap there are several scales
        ready = [g * grad_loss for g in ready]
    elif is_fake or grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:  # reading is free only on CPU
        ready = [g.mul_(grad_loss) for g in ready]
    return {
        name: g.to(inputs[name].dtype) for name, g, wanted in zip(Needs._fields, ready, needs, strict=True) if wanted
    }


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


derivatives.register(linear_ranking_loss, setup_context=_save_linear_ranking, backward=_linear_ranking_gradients)
