"""AdamW whose every state has the weights' own dtype, for weights in bfloat16 without float32 masters.

A bfloat16 number has 8 significant bits. A weight of 0.02 stands 6e-5 from its neighbours' midpoint, so steps of 1e-6,
rounded one by one, are all lost. Two remedies:

- **Weights** carry what rounding took from them (Kahan's compensated summation): the lost part of every step is
  added to the next one. Weight and compensation together hold 16 bits.
- **Moments** are rounded stochastically, up or down with the probability that makes the mean right. The second moment
  changes by a thousandth of itself a step; rounded to nearest it would never shrink.

A trained weight then takes 10 bytes (weight, gradient, compensation, two moments) where float32 masters take 16.
The random bits come from the step and the weight's place in the list, not from torch's own generator: replicas stay
the same on all ranks, and a resumed run goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["AdamWKahan"]

_LOST_BITS = {torch.bfloat16: 16}
"""Bits of a float32 that a dtype of its exponents leaves off."""


class AdamWKahan(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with compensated bfloat16 weights; float32 and float64 weights are treated plainly.

    Args:
        params: parameters or groups of them, in float64, float32 or bfloat16.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.

    Raises:
        ValueError: a setting out of range, or a weight of another dtype.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr = {lr} must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas = {betas} must each be in [0, 1)")
        if not eps > 0:
            raise ValueError(f"eps = {eps} must be above 0")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay = {weight_decay} must be at least 0")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16):
                    raise ValueError(f"a weight is {weight.dtype}; AdamWKahan takes float64, float32 and bfloat16")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the parameters' gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for weight in group["params"]:
                place += 1
                if weight.grad is not None:
                    self._update(weight, weight.grad, group, place)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            if weight.dtype in _LOST_BITS:
                state["compensation"] = torch.zeros_like(weight)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        exact = torch.promote_types(weight.dtype, torch.float32)
        gradient = gradient.to(exact)
        first = state["exp_avg"].to(exact, copy=True).lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].to(exact, copy=True).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        _store(state["exp_avg"], first, step, 2 * place)
        _store(state["exp_avg_sq"], second, step, 2 * place + 1)
        denominator = second.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        change = first.div_(denominator).mul_(-group["lr"] / (1 - beta1**step))
        before = weight.to(exact)
        change.add_(before, alpha=-group["lr"] * group["weight_decay"])
        if "compensation" not in state:
            weight.add_(change)
            return
        change.add_(state["compensation"])
        weight.copy_(before + change)
        state["compensation"].copy_(change.sub_(weight.to(exact).sub_(before)))


def _store(target: Tensor, value: Tensor, step: int, place: int) -> None:
    """`target` = `value`, rounded stochastically where `target` has fewer bits."""
    lost = _LOST_BITS.get(target.dtype)
    if lost is None:
        target.copy_(value)
        return
    generator = torch.Generator(target.device).manual_seed(step * 1_000_003 + place)
    noise = torch.randint(1 << lost, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    # Adding below the last bit kept carries into it with the right probability; then the low bits are cut off.
    target.copy_(noise.add_(value.contiguous().view(torch.int32)).bitwise_and_(-(1 << lost)).view(torch.float32))
