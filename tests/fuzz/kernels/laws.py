"""The laws of a call: within a small multiple of the reference's error, the same bits again, inputs left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.tuna_kernels.bounds import FACTOR

UNITS = 16.0
Results = dict[str, Tensor]


def within_bounds(
    got: Results, references: list[Results], truth: Results, scales: dict[str, float], rounded: torch.dtype, what: str
) -> None:
    """``|got - truth| <= 4 * reference's error + 16 units of rounding of the terms that were summed``.

    Args:
        got: results of a backend.
        references: results of the reference in the types of the call, in several orders of summation, so that none is
            taken for more exact than it is because of one lucky order.
        truth: results of the reference in float64.
        scales: size of the terms that make up each result, by name.
        rounded: the type gradients are rounded to before they are multiplied.
        what: the case, for the message.
    """
    assert got.keys() == truth.keys(), f"{what}: {sorted(got)} instead of {sorted(truth)}"
    for name, true in truth.items():
        mine, books = got[name], torch.stack([t[name].double() for t in references])
        assert mine.shape == true.shape and mine.dtype == references[0][name].dtype, f"{what}: {name} {mine.dtype}"
        # Where the reference leaves what its type can hold, there is no bound.
        judged = books.isfinite().all(0) | ~true.isfinite()
        most = torch.finfo(mine.dtype).max
        mine, true, books = mine.double()[judged], true.double()[judged], books[:, judged]
        if not true.numel():
            continue
        both_nan = mine.isnan() & true.isnan()
        same = both_nan | (mine == true)
        finite = true.isfinite()
        wrong = ~finite & ~same
        assert not bool(wrong.any()), f"{what}: {name} {mine[wrong][0]} where {true[wrong][0]} is right"
        if not bool(finite.any()):
            continue
        error = (mine.clamp(-most, most) - true)[finite].abs().max().item()
        own = (books - true)[:, finite].abs().max().item()
        size = max(true[finite].abs().max().item(), scales.get(name, 0.0))
        is_double = got[name].dtype == torch.float64
        limit = FACTOR * own + UNITS * torch.finfo(torch.float64 if is_double else torch.float32).eps * size
        if name.startswith("d ") and rounded != torch.float32 and not is_double:
            limit += torch.finfo(rounded).eps * size
        if is_double:
            limit *= 4  # there is no better truth than float64
        assert error <= limit, f"{what}: {name} is off by {error:.3g}, bound {limit:.3g} (reference {own:.3g})"


def same_bits(first: Results, second: Results, what: str) -> None:
    for name, value in first.items():
        same = (value == second[name]) | (value.isnan() & second[name].isnan())
        assert bool(same.all()), f"{what}: {name} differs in bits between two equal calls"


def run(call: Callable[[], tuple[Tensor, ...]], leaves: dict[str, Tensor], upstream: list[Tensor]) -> list[Results]:
    """Results and gradients, those of a second backward, and those of a second call."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

    def results(outputs: tuple[Tensor, ...], *, retain: bool) -> Results:
        found: Results = {f"out {i}": o.detach() for i, o in enumerate(outputs)}
        if wanted:
            flowing: list[Any] = [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
            connected = [(o, u) for o, u in zip(outputs, flowing, strict=True) if o.requires_grad]
            gradients = torch.autograd.grad(
                [o for o, _ in connected],
                list(wanted.values()),
                [u for _, u in connected],
                retain_graph=retain,
                allow_unused=True,
            )
            found |= {
                f"d {name}": torch.zeros_like(leaf) if g is None else g.clone()
                for (name, leaf), g in zip(wanted.items(), gradients, strict=True)
            }
        return found

    outputs = call()
    return [results(outputs, retain=True), results(outputs, retain=False), results(call(), retain=False)]
