"""One random call of ``linear_logprobs``."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.kernels.drawing import HALF, floats, integers, laid_out
from tests.fuzz.kernels.laws import FACTOR, UNITS, Results, run, same_bits, within_bounds
from tuna_kernels import available_backends, linear_logprobs
from tuna_kernels.head.cpu import multiplies
from tuna_kernels.native import ISA_VARIABLE

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def backends(*dtypes: torch.dtype, entries: int) -> list[str]:
    """Those of this machine that serve the types; Triton's interpreter, where it is asked for, for few ``entries`` of
    the matrix of logits or scores."""
    served = [name for name, reason in available_backends().items() if not reason and name in ("torch", "cpu")]
    if torch.float64 in dtypes:
        served.remove("cpu")
    if os.environ.get("TRITON_INTERPRET") == "1" and torch.float64 not in dtypes and entries < 20_000:
        return ["triton"]
    return served


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Which native products run; ``""``: the best."""
    before = os.environ.pop(ISA_VARIABLE, None)
    if name:
        os.environ[ISA_VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(ISA_VARIABLE, None)
        if before is not None:
            os.environ[ISA_VARIABLE] = before


@dataclass
class HeadCase:
    """Tensors in the types of the call, as laid out, and its settings."""

    leaves: dict[str, Tensor]
    targets: Tensor
    rows: Tensor | None
    options: dict[str, Any]
    lora_scale: float = 0.0
    text: str = ""
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [leaf.dtype for leaf in self.leaves.values()]

    def call(self, leaves: dict[str, Tensor], backend: str) -> Any:
        lora = (leaves["lora_a"], leaves["lora_b"], self.lora_scale) if "lora_a" in leaves else None
        return linear_logprobs(
            leaves["hidden"],
            leaves["weight"],
            self.targets,
            rows=self.rows,
            bias=leaves.get("bias"),
            lora=lora,
            return_lse=True,
            backend=backend,
            **self.options,
        )


def rounded_in(dtypes: list[torch.dtype], backend: str) -> torch.dtype:
    """The type gradients of logits are rounded to before they are multiplied."""
    one = set(dtypes[:2])
    if len(one) > 1 or dtypes[0] not in HALF:
        return torch.float32
    return dtypes[0] if backend == "triton" or (backend == "cpu" and multiplies(dtypes[0])) else torch.float32


def leaves_of(
    rng: random.Random, tokens: int, vocabulary: int, width: int, spread: float, scale: float
) -> dict[str, Tensor]:
    """hidden, weight and at times bias and an adapter, each of a type, layout and wish for a gradient of its own.

    Some entries of the bias leave their token no probability, never all of them.
    """
    first = rng.choice(DTYPES)

    def dtype() -> torch.dtype:
        return first if rng.random() < 0.7 else rng.choice(DTYPES)

    drawn = {
        "hidden": floats(rng, tokens, width, scale=spread),
        "weight": floats(rng, vocabulary, width),
    }
    if rng.random() < 0.4:
        drawn["bias"] = floats(rng, vocabulary, scale=rng.choice([0.0, 1.0, 30.0])) + rng.choice([0, 0, -500, 500])
        if rng.random() < 0.4 and vocabulary > 1 and scale != 0:
            masked = integers(rng, 1, vocabulary, rng.randint(1, vocabulary))
            drawn["bias"][masked] = -torch.inf if scale > 0 else torch.inf
    if rng.random() < 0.3:
        rank = rng.choice([1, 2, 5])
        drawn["lora_a"] = floats(rng, rank, width)
        drawn["lora_b"] = floats(rng, vocabulary, rank, scale=rng.choice([0.0, 0.5]))
    frozen = rng.random() < 0.3
    made = {}
    for name, values in drawn.items():
        leaf = laid_out(rng, values.to(dtype()))
        if name == "hidden" and tokens > 1 and rng.random() < 0.05:
            leaf = leaf[:1].expand(tokens, width)
        made[name] = leaf.requires_grad_(name == "hidden" if frozen else rng.random() < 0.8)
    return made


def draw(rng: random.Random) -> HeadCase:
    tokens = rng.choice([1, 2, 3, 15, 16, 17, 40, 130])
    vocabulary = rng.choice([1, 2, 3, 17, 255, 256, 1000, 2047, 2048, 2049, 5003])
    width = rng.choice([1, 2, 7, 16, 33, 64, 100])
    spread = rng.choice([0.0, 0.01, 1.0, 1.0, 5.0, 30.0]) / width**0.5
    scale = rng.choice([1.0, 1.0, 1.0, 0.3, -1.0, -50.0, 100.0, 1e4, 1e-3, 1e9, 0.0])
    leaves = leaves_of(rng, tokens, vocabulary, width, spread, scale)
    valid = rng.choice([None, None, None, rng.randint(1, vocabulary)])  # the rest is padding
    ignore = rng.choice([-100, -100, -1, 0, vocabulary - 1])
    rows: Tensor | None = None
    slots = tokens
    if rng.random() < 0.6:
        slots = rng.choice([0, 1, 5, 60, 200])
        rows = laid_out(rng, integers(rng, 0, tokens, slots))
    targets = integers(rng, 0, valid or vocabulary, slots)
    targets[integers(rng, 0, 4, slots) == 0] = ignore
    if rng.random() < 0.05:
        targets[:] = ignore
    softcap = rng.choice([None, None, None, 0.5, 5.0, 30.0, 1e3])
    options = {
        "ignore_index": ignore,
        "logit_scale": scale,
        "softcap": softcap,
        "return_entropy": rng.random() < 0.5,
        "valid_vocab": valid,
    }
    text = ", ".join(
        f"{n} {list(x.shape)} {str(x.dtype)[6:]} strides {x.stride()}{' grad' if x.requires_grad else ''}"
        for n, x in leaves.items()
    )
    text += f"; {slots} slots{'' if rows is None else ' by rows'}, spread {spread:.3g}, {options}"
    return HeadCase(leaves, laid_out(rng, targets), rows, options, lora_scale=rng.choice([0.5, 2.0]), text=text)


def in_another_order(leaves: dict[str, Tensor], order: Tensor | None) -> dict[str, Tensor]:
    """Copies of the leaves with the width permuted: the same products, summed in another order."""
    made = {}
    for name, leaf in leaves.items():
        copy = leaf.detach().clone()
        if order is not None and name in ("hidden", "weight", "lora_a"):
            copy = copy[:, order]
        made[name] = copy.requires_grad_(leaf.requires_grad)
    return made


def references(case: Any, leaves: dict[str, Tensor], upstream: list[Tensor], rng: random.Random) -> list[Results]:
    """The reference in the types of the call, in three orders of summation."""
    width = leaves["hidden"].shape[1]
    found = []
    for turn in range(3):
        order = None if turn == 0 else torch.tensor(rng.sample(range(width), width))
        copies = in_another_order(leaves, order)
        (book, *_) = run(lambda c=copies: case.call(c, "reference"), copies, upstream)  # type: ignore[misc]
        if order is not None:
            back = torch.argsort(order)
            for name in ("d hidden", "d weight", "d lora_a"):
                if name in book:
                    book[name] = book[name][:, back]
        found.append(book)
    return found


def _largest(x: Tensor) -> float:
    x = x.detach().double()
    return x[x.isfinite()].abs().max().item() if x.numel() else 0.0


def size_of_logits(leaves: dict[str, Tensor], scale: float, lora_scale: float) -> float:
    """At least 1: the size of logits whose rounding is the error that float32 products make of these.

    Of all logits, where a call has few slots, on which the reference may be lucky. In float64 there is no better truth
    to compare with, and both sides round logits of their size.
    """
    is_double = any(x.dtype == torch.float64 for x in leaves.values())

    def logits(dtype: torch.dtype) -> Tensor:
        x = {name: leaf.detach().to(dtype) for name, leaf in leaves.items()}
        z = x["hidden"] @ x["weight"].t()
        if "lora_a" in x:
            z = z + lora_scale * (x["hidden"] @ x["lora_a"].t()) @ x["lora_b"].t()
        return (z + x["bias"] if "bias" in x else z) * scale

    true = logits(torch.float64)
    finite = true.isfinite()
    if not bool(finite.any()):
        return 1.0
    if is_double:
        return max(1.0, _largest(true))
    error = (logits(torch.float32).double() - true)[finite].abs().max().item()
    return max(1.0, FACTOR * error / (UNITS * torch.finfo(torch.float32).eps))


def gradient_scales(leaves: dict[str, Tensor], size: float) -> dict[str, float]:
    """Of the terms that make up each gradient, where one logit's gradient has ``size``."""

    h, w = _largest(leaves["hidden"]), _largest(leaves["weight"])
    scales = {"d hidden": size * w, "d weight": size * h, "d bias": size}
    if "lora_a" in leaves:
        a, b = _largest(leaves["lora_a"]), _largest(leaves["lora_b"])
        width = leaves["hidden"].shape[1] ** 0.5
        scales["d hidden"] += 2 * size * a * b
        scales |= {"d lora_a": 2 * size * b * h, "d lora_b": 2 * size * a * h * width}
    return scales


def check(rng: random.Random) -> None:
    case = draw(rng)
    count = 2 + case.options["return_entropy"]
    upstream = [laid_out(rng, floats(rng, case.targets.numel(), scale=rng.choice([1e-4, 1.0]))) for _ in range(count)]
    if rng.random() < 0.3:
        upstream[0][::2] = 0
    backend, isa = (
        rng.choice(backends(*case.dtypes, entries=len(case.leaves["hidden"]) * len(case.leaves["weight"]))),
        rng.choice(["", "", "avx512", "avx2", "generic"]),
    )
    doubles = {n: x.detach().double().clone().requires_grad_(x.requires_grad) for n, x in case.leaves.items()}
    (truth, *_) = run(lambda: case.call(doubles, "reference"), doubles, upstream)
    books = references(case, case.leaves, upstream, rng)
    what = f"linear_logprobs on {backend} {isa}: {case.text}"
    with instruction_set(isa):
        before = {n: x.detach().clone() for n, x in case.leaves.items()}
        first, *again = run(lambda: case.call(case.leaves, backend), case.leaves, upstream)
        rounded = rounded_in(case.dtypes, backend)
    for other in again:
        same_bits(first, other, what)
    same_bits(before, {n: x.detach() for n, x in case.leaves.items()}, f"{what}: inputs")
    per_row = 1 if case.rows is None or not case.rows.numel() else int(case.rows.bincount().max())
    size = per_row * sum(u.abs().max().item() if u.numel() else 0.0 for u in upstream)
    steepness = abs(case.options["logit_scale"])
    logits = size_of_logits(case.leaves, steepness, case.lora_scale)
    size *= logits
    scales = dict.fromkeys(("out 0", "out 1", "out 2"), logits) | gradient_scales(case.leaves, size * steepness)
    within_bounds(first, books, truth, scales, rounded, what)
