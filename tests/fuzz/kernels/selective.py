"""One random call of ``selective_logprobs``."""

from __future__ import annotations

import random

import torch

from tests.fuzz.kernels.drawing import HALF, floats, integers, laid_out
from tests.fuzz.kernels.head import DTYPES, backends
from tests.fuzz.kernels.laws import run, same_bits, within_bounds
from tuna_kernels import selective_logprobs


def check(rng: random.Random) -> None:
    dtype = rng.choice(DTYPES)
    vocabulary = rng.choice([1, 2, 17, 255, 257, 1000, 20011])
    shape = rng.choice([(0,), (1,), (7,), (40,), (3, 5), (2, 1, 6)])
    spread = rng.choice([0.0, 1.0, 10.0, 1000.0])
    shift = rng.choice([0.0, 0.0, 1e4, -1e4])
    temperature = rng.choice([1.0, 1.0, 0.6, 3.0, 0.1, 0.01, 1e-3, 1e-6, 1e-9, 1e-20, 1e3, 1e20])
    values = floats(rng, *shape, vocabulary, scale=spread) + shift
    if rng.random() < 0.2:
        values[..., integers(rng, 0, vocabulary, rng.randint(1, vocabulary))] = -torch.inf
    logits = laid_out(rng, values.to(dtype))
    if shape[0] > 1 and rng.random() < 0.1:
        logits = logits[:1].expand(*shape, vocabulary)
    count = torch.Size(shape).numel()
    targets = integers(rng, 0, vocabulary, count)
    if rng.random() < 0.3:
        targets = logits.detach().float().argmax(-1).reshape(-1)
    ignore = rng.choice([-100, -1, 0])
    targets[integers(rng, 0, 4, count) == 0] = ignore
    targets = laid_out(rng, targets.view(shape))
    upstream = [laid_out(rng, floats(rng, *shape, scale=rng.choice([1e-4, 1.0])))]
    backend = rng.choice(backends(dtype, entries=values.numel()))
    what = (
        f"selective_logprobs on {backend}: logits {[*shape, vocabulary]} {str(dtype)[6:]} strides {logits.stride()}, "
        f"spread {spread:g}, shift {shift:g}, temperature {temperature:g}, ignore_index {ignore}"
    )

    def results(x: torch.Tensor, name: str) -> list[dict[str, torch.Tensor]]:
        leaf = x.detach().requires_grad_()
        return run(
            lambda: (selective_logprobs(leaf, targets, temperature=temperature, ignore_index=ignore, backend=name),),
            {"logits": leaf},
            upstream,
        )

    # The largest logit is taken off first: a large one divided by a small temperature is too coarse even in float64.
    exact = logits.detach().double()
    largest = exact.amax(-1, keepdim=True)
    exact = exact - torch.where(largest.isfinite(), largest, 0)
    truth, book = results(exact, "reference")[0], results(logits.clone(), "reference")[0]
    before = logits.clone()
    first, *again = results(logits, backend)
    for other in again:
        same_bits(first, other, what)
    same_bits({"logits": before}, {"logits": logits}, f"{what}: inputs")
    size = upstream[0].abs().max().item() / temperature if count else 0.0
    # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
    rounded = dtype if backend == "triton" and dtype in HALF else torch.float32
    within_bounds(first, [book], truth, {"out 0": 1.0, "d logits": size}, rounded, what)
