"""Random tensors of every layout, and random groups."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tuna_kernels import Group

HALF = (torch.bfloat16, torch.float16)


def floats(rng: random.Random, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal float64 numbers."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def integers(rng: random.Random, low: int, high: int, count: int) -> Tensor:
    """int64 in [low, high)."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return torch.randint(low, high, (count,), generator=generator)


def laid_out(rng: random.Random, values: Tensor) -> Tensor:
    """The same numbers in another layout: transposed, cut out of something larger, every other one, or as they are."""
    kind = rng.choice(["plain", "plain", "transposed", "cut", "steps", "apart", "offset"])
    if values.ndim == 0 or kind == "plain":
        return values.contiguous()
    if kind == "transposed" and values.ndim > 1:
        a, b = rng.sample(range(values.ndim), 2)
        return values.transpose(a, b).contiguous().transpose(a, b)
    if kind == "offset":
        storage = values.new_empty(values.numel() + 3)
        return storage[3:].view(values.shape).copy_(values)
    shape = list(values.shape)
    axis = values.ndim - 1 if kind == "apart" else rng.randrange(values.ndim)
    if kind == "cut":
        before, after = rng.randrange(3), rng.randrange(1, 4)
        shape[axis] += before + after
        room = torch.full_like(values.new_empty(shape), 7).narrow(axis, before, values.shape[axis])
    else:
        shape[axis] *= 2
        steps = [slice(None)] * values.ndim
        steps[axis] = slice(rng.randrange(2), None, 2)
        room = torch.full_like(values.new_empty(shape), 7)[tuple(steps)]
    return room.copy_(values)


def groups(rng: random.Random, vocabulary: int) -> list[Group]:
    """Prompts that begin alike, candidates that are equal, prefixes of one another, or alone; few tokens, so that trees
    are deep."""
    alphabet = min(vocabulary, rng.choice([2, 3, 1000]))

    def tokens(count: int) -> list[int]:
        return [rng.randrange(alphabet) for _ in range(count)]

    made = []
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        responses: list[list[int]] = []
        for _ in range(rng.choice([1, 2, 3, 4, 7])):
            kind = rng.random()
            if responses and kind < 0.15:
                responses.append(list(rng.choice(responses)))
            elif responses and kind < 0.4:
                other = rng.choice(responses)
                responses.append(other[: rng.randint(1, len(other))] + tokens(rng.choice([0, 1, 4])))
            else:
                responses.append(tokens(rng.choice([1, 1, 2, 5, 12, 40])))
        k = len(responses)
        given = [float(rng.randrange(3)) for _ in range(k)]
        made.append(Group(tokens(rng.choice([1, 2, 9, 30])), responses, scores=given))
    return made
