"""How far our ops can be differentiated: once, in reverse mode. What goes further raises, where it would be wrong.

`torch.library.custom_op` as it is drops the tangents of forward mode without a word, gives gradients that count as
constants when they are differentiated once more, and has no `torch.func.grad`. So every op is registered here:

* reverse mode, with autograd and with `torch.func.grad`, `vjp`, `jacrev`, also under `vmap`;
* forward mode (`torch.func.jvp`, `jacfwd`, `hessian`, `forward_ad.dual_level`) raises, or takes the op's own rule;
* a gradient taken with `create_graph=True` is joined to all it depends on by a node that raises when it is
  differentiated, unless the op says that its gradient is made of differentiable operations.

The backend `"reference"` is plain PyTorch and differentiable in either mode, as often as wanted.
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
"""`(ctx, inputs, output)`, as `torch.library.register_autograd` takes it, with the inputs as a named tuple."""
Backward: TypeAlias = Callable[..., Gradients]
"""`(ctx, saved tensors, *grads)`: gradients by the names of the inputs; inputs left out have none."""


def register(
    op: CustomOpDef,
    *,
    setup_context: SetupContext | None = None,
    backward: Backward | None = None,
    jvp: Callable[..., Any] | None = None,
    twice: bool = False,
    instead: str = 'backend="reference", which PyTorch differentiates in either mode as often as wanted',
) -> None:
    """Make `op` differentiable by `backward`; without one it is an op that only gradients are made with.

    Args:
        op: its backend and fake implementations may come before or after.
        setup_context: what the backward needs, from the op's inputs (defaults filled in) and output.
        backward: given `ctx`, whose `needs` says by name which inputs need a gradient, `ctx.saved_tensors` and
            the gradients of the outputs.
        jvp: `(ctx, *tangents of the inputs)`: the tangents of the outputs, where forward mode is served.
        twice: `backward` is made of differentiable operations and right to differentiate again.
        instead: what to use where the op is not differentiable enough.
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
        saved = ctx.saved_tensors  # once: a checkpoint recomputes them for the first who asks, and refuses the second
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

    # Inside torch.func the dispatcher calls this once for each transform, which it has entered: a single level.
    def kernel(keyset: Any, *given: Any) -> Any:
        with enable_single_level_autograd_function():
            return function.apply(keyset, *given)

    with warnings.catch_warnings():  # in the place of the kernel that custom_op made
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        op._lib.impl(name, kernel, "Autograd", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]


class _FirstOrder(torch.autograd.Function):
    """A gradient as it is, joined to what it was made of; its own gradient is refused."""

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
