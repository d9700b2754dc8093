"""Laws of `AdamWKahan`: bfloat16 weights go where float32 masters go; float32 weights are torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tuna.train.adamw_kahan import AdamWKahan

STEPS, RATE = 200, 1e-6


def moved(optimizer: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> torch.Tensor:
    """How far 200 steps at 1e-6 move weights of the size of a language model's, on gradients with a trend."""
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(64, 64, generator=generator) * 0.02).to(torch.bfloat16)
    trend = torch.randn(64, 64, generator=generator)
    weight = torch.nn.Parameter(start.to(dtype, copy=True))
    steps = optimizer([weight], lr=RATE)
    for _ in range(STEPS):
        weight.grad = (trend + 0.5 * torch.randn(64, 64, generator=generator)).to(torch.bfloat16).to(dtype)
        steps.step()
    return weight.detach().double() - start.double()


def test_small_steps_move_bfloat16_weights_as_they_move_float32_masters() -> None:
    """The movement along that of the masters is within 10% of theirs; plain bfloat16 stays where it was."""
    masters = moved(torch.optim.AdamW, torch.float32)
    share = {
        name: float((moved(optimizer, torch.bfloat16) * masters).sum() / masters.square().sum())
        for name, optimizer in (("kahan", AdamWKahan), ("plain", torch.optim.AdamW))
    }
    assert abs(share["kahan"] - 1) < 0.1
    assert share["plain"] < 0.5


def test_what_is_kept_back_is_not_lost() -> None:
    """Weight plus compensation follows the masters to a twentieth of the way, weight by weight."""
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(64, 64, generator=generator) * 0.02).to(torch.bfloat16)
    gradient = torch.randn(64, 64, generator=generator).to(torch.bfloat16)
    half, full = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours, theirs = AdamWKahan([half], lr=RATE), torch.optim.AdamW([full], lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        half.grad, full.grad = gradient.clone(), gradient.float()
        ours.step()
        theirs.step()
    found = half.double() + ours.state[half]["compensation"].double() - start.double()
    expected = full.double() - start.double()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_the_second_moment_shrinks() -> None:
    """Rounded to nearest, a bfloat16 second moment would stay at its largest value for ever."""
    weight = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    steps = AdamWKahan([weight], lr=0.0)
    for size in [1.0] * 5 + [0.0] * 500:
        weight.grad = torch.full_like(weight, size)
        steps.step()
    expected = (1 - 0.999**5) * 0.999**500
    assert steps.state[weight]["exp_avg_sq"].double().mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_are_torchs_adamw(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8, 5, generator=generator, dtype=dtype)
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1}
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = AdamWKahan([weights[0]], **settings), torch.optim.AdamW([weights[1]], **settings)
    for _ in range(5):
        gradient = torch.randn(8, 5, generator=generator, dtype=dtype)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_a_saved_state_goes_on_with_the_same_bits() -> None:
    def run(cut: int | None) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(0.01, 1, 50).bfloat16())
        optimizer = AdamWKahan([weight], lr=1e-3)
        for step in range(10):
            if step == cut:
                state = optimizer.state_dict()
                torch.manual_seed(step)  # torch's own generator has no say
                optimizer = AdamWKahan([weight], lr=1e-3)
                optimizer.load_state_dict(state)
            weight.grad = (torch.arange(50.0) - 20 + step).bfloat16()
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(None), run(4))


def test_bad_settings_are_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="float16"):
        AdamWKahan([weight])
    for settings, match in (({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.9)}, "betas"), ({"eps": 0.0}, "eps")):
        with pytest.raises(ValueError, match=match):
            AdamWKahan([weight], **settings)  # type: ignore[arg-type]
