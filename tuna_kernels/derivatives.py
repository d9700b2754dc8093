"""Differentiability of our ops: once, in reverse mode. Other derivatives raise instead of being wrong.

Plain `torch.library.custom_op` silently drops the tangents of forward mode, returns gradients that are constants
under a second differentiation, and does not support `torch.func.grad`. So every op is registered here:

* reverse mode, with autograd and with `torch.func.grad`, `vjp`, `jacrev`, also under `vmap`;
* forward mode (`torch.func.jvp`, `jacfwd`, `hessian`, `forward_ad.dual_level`) raises, or uses the op's own rule;
* a gradient taken with `create_graph=True` is connected to everything it depends on by a node that raises when
  differentiated, unless the op declares that its gradient consists of differentiable operations.

The backend `"reference"` is plain PyTorch and differentiable in both modes, to any order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.custom_ops import CustomOpDef
from torch.autograd.function import _SingleLevelFunction

from tuna_kernels.arguments import named_arguments

__all__ = ["register"]

Gradients: TypeAlias = Mapping[str, Tensor | None]
SetupContext: TypeAlias = Callable[[Any, Any, Any], None]
"""`(ctx, inputs, output)`, as for `torch.library.register_autograd`, with the inputs as a named tuple."""
Backward: TypeAlias = Callable[..., Gradients]
"""`(ctx, saved tensors, *grads)`: gradients by input name; omitted inputs have none."""


def register(
    op: CustomOpDef,
    *,
    setup_context: SetupContext | None = None,
    backward: Backward | None = None,
    jvp: Callable[..., Any] | None = None,
    twice: bool = False,
    instead: str = 'backend="reference", which PyTorch differentiates in both modes, to any order',
) -> None:
    """Make `op` differentiable by `backward`; without one it is an op used only to compute gradients.

    Args:
        op: its backend and fake implementations may be registered before or after.
        setup_context: saves what the backward needs from the op's inputs (defaults filled in) and output.
        backward: takes `ctx`, whose `needs` says by name which inputs need a gradient, `ctx.saved_tensors` and
            the gradients of the outputs.
        jvp: `(ctx, *tangents of the inputs)`: the tangents of the outputs, if forward mode is supported.
        twice: `backward` consists of differentiable operations, so that it can be differentiated again.
        instead: what the error message recommends for other derivatives.
    """
    overload = op._opoverload
    name = overload._opname
    no_second = f"{name} has no second derivative (create_graph=True, a gradient penalty): use {instead}"
    no_forward = f"{name} has no forward-mode derivative (jvp, jacfwd, hessian, dual tensors): use {instead}"
    named = named_arguments(overload)

    def forward(ctx: Any, keyset: Any, *given: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(keyset & torch._C._after_autograd_keyset, *given)
        if setup_context is not None:
            setup_context(ctx, named(*given), output)
        return output

    def gradients(ctx: Any, *grads: Tensor | None) -> Any:
        if backward is None:
            raise RuntimeError(no_second)
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them on first access and refuses a second
        ctx.needs = named(*ctx.needs_input_grad[1:])
        with torch.set_grad_enabled(twice and torch.is_grad_enabled()):
            by_name = backward(ctx, saved, *grads)
        made = [by_name.get(name) for name in named._fields]
        if not twice and torch.is_grad_enabled():
            sources = [x for x in (*saved, *grads) if x is not None and x.requires_grad]
            made = [None if x is None else _FirstOrder.apply(no_second, x, *sources) for x in made]  # type: ignore[no-untyped-call]
        return None, *made

    def tangents(ctx: Any, *given: Tensor | None) -> Any:
        if jvp is None:
            raise RuntimeError(no_forward)
        return jvp(ctx, *given[1:])

    rules: dict[str, Any] = {"forward": forward, "backward": gradients, "jvp": tangents}
    function: Any = type(name, (_SingleLevelFunction,), {key: staticmethod(rule) for key, rule in rules.items()})

    # Inside torch.func the dispatcher enters each transform and calls this once per transform: a single level.
    def kernel(keyset: Any, *given: Any) -> Any:
        with enable_single_level_autograd_function():
            return function.apply(keyset, *given)

    with warnings.catch_warnings():  # replaces the kernel registered by custom_op
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        op._lib.impl(name, kernel, "Autograd", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]


class _FirstOrder(torch.autograd.Function):
    """A gradient, unchanged, connected to its sources; differentiating it raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(refusal: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.refusal = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.refusal)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(ctx.refusal)
