"""AdamW with all states in the dtype of the weights, for training in bfloat16 without float32 master weights.

A bfloat16 number has 8 significant bits. A weight of 0.02 is 6e-5 away from the midpoint to its neighbours, so updates
of 1e-6 are all lost to rounding. Two remedies:

- **Weights** have a compensation term (Kahan summation): the part of an update lost to rounding is added to the next
  update. Weight and compensation together hold 16 bits.
- **Moments** are rounded stochastically, up or down with probabilities that keep the mean unbiased. The second moment
  changes by a thousandth per step; rounded to nearest it would never shrink.

A trained weight then takes 10 bytes (weight, gradient, compensation, two moments) instead of 16 with float32 masters.
The random bits are derived from the step and the weight's index, not from torch's generator: replicas stay identical on
all ranks, and a resumed run continues with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["AdamWKahan"]

_LOST_BITS = {torch.bfloat16: 16}
"""Low bits of a float32 that a dtype with the same exponent range drops."""


class AdamWKahan(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with compensated bfloat16 weights; float32 and float64 weights get plain AdamW.

    Args:
        params: parameters or parameter groups, in float64, float32 or bfloat16.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay.

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
                    raise ValueError(f"a weight is {weight.dtype}; AdamWKahan supports float64, float32 and bfloat16")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimizer step."""
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
    """`target` = `value`, rounded stochastically if `target` has fewer bits."""
    lost = _LOST_BITS.get(target.dtype)
    if lost is None:
        target.copy_(value)
        return
    generator = torch.Generator(target.device).manual_seed(step * 1_000_003 + place)
    noise = torch.randint(1 << lost, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    # Random bits added below the last kept bit carry into it with the right probability; then the low bits are cut.
    target.copy_(noise.add_(value.contiguous().view(torch.int32)).bitwise_and_(-(1 << lost)).view(torch.float32))
