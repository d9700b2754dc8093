"""Checks every GPU kernel against the float64 oracle on the present card: `tuna info --self-check`.

The kernels are tested in Triton's interpreter and compiled for every architecture without a GPU, but not with the
user's card, driver and compiler. The self-check runs each kernel forward and backward on small inputs, within a minute,
and caches a pass for this kind of card and these versions. Until then the first use of the kernels on a card gives a
warning.

A check passes if its error is at most 4 times the error plain PyTorch makes in the same types, plus 16 units of
float32 rounding (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.gpu import checked_cards
from tuna_kernels.head.logprobs import linear_logprobs, selective_logprobs
from tuna_kernels.head.ranking_loss import linear_ranking_loss
from tuna_kernels.tree import Group, pack_groups

__all__ = ["Check", "run_checks"]

FACTOR, UNITS = 4.0, 16.0
Run = Callable[[torch.dtype, str], dict[str, Tensor]]


@dataclass(frozen=True)
class Check:
    """The result for one kernel path. `error` and `limit` (absolute) are those of the output closest to its limit;
    `reason` says why it failed, "" if it passed."""

    name: str
    error: float
    limit: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


def run_checks(device: torch.device | str, backend: str = "triton", *, small: bool = False) -> Iterator[Check]:
    """Yield all checks of `backend` on `device` as they finish; if all pass on a GPU, this is cached.

    Args:
        device: where to run.
        backend: the backend to check.
        small: small shapes for the interpreter: seconds instead of minutes.
    """
    device = torch.device(device)
    every = True
    for name, dtype, run in _cases(device, small):
        check = _check(name, dtype, run, backend)
        every &= check.passed
        yield check
    if every and device.type == "cuda":
        checked_cards.remember(device, backend)


def _cases(device: torch.device, small: bool) -> Iterator[tuple[str, torch.dtype, Run]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield "linear_logprobs", dtype, _LinearLogprobs(device, small)
        yield "linear_logprobs, bias, softcap, entropy, log-sum-exp", dtype, _LinearLogprobs(device, small, plain=False)
        yield "linear_logprobs, frozen head", dtype, _LinearLogprobs(device, small, frozen=True)
        yield "selective_logprobs", dtype, _selective(device, small)
        yield "linear_ranking_loss", dtype, _ranking(device, small, budget=None)
        yield "linear_ranking_loss, recomputed", dtype, _ranking(device, small, budget=0)
        for size in (64, 128) if not small else (64,):
            yield f"tree_attention, heads of {size}", dtype, _attention(device, size, window=None, softcap=None)
        yield "tree_attention, window, softcap", dtype, _attention(device, 64, window=5, softcap=4.0)


def _check(name: str, dtype: torch.dtype, run: Run, backend: str) -> Check:
    name = f"{name}, {str(dtype).removeprefix('torch.')}"
    truth = run(torch.float64, "reference")
    reference = run(dtype, "reference")
    try:
        got = run(dtype, backend)
    except Exception as error:  # a compiler or driver may raise anything; the other checks are still useful
        return Check(name, float("nan"), 0.0, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    worst = Check(name, 0.0, float("inf"))
    for part, right in truth.items():
        off = float((got[part].double() - right).abs().max())
        own = float((reference[part].double() - right).abs().max())
        limit = FACTOR * own + UNITS * torch.finfo(torch.float32).eps * float(right.abs().max())
        if not off <= limit:
            return Check(name, off, limit, f"error of {part} is {off:.2g}, limit {limit:.2g}")
        if worst.limit == float("inf") or off * worst.limit >= worst.error * limit:
            worst = Check(name, off, limit)
    return worst


def _random(device: torch.device, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
    maker = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=maker) * scale).to(torch.float16).to(device)  # exact in every type but bf16


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to bfloat16 first, so that all dtypes start from the same values."""
    return tensor.bfloat16().to(dtype)


class _LinearLogprobs:
    """`linear_logprobs` with a vocabulary and width that no tile divides, and rows with several slots or none."""

    def __init__(self, device: torch.device, small: bool, *, plain: bool = True, frozen: bool = False) -> None:
        self.rows, self.width, self.vocab = (19, 40, 151) if small else (300, 520, 32003)
        self.device, self.plain, self.frozen = device, plain, frozen

    def __call__(self, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        hidden = _as(_random(self.device, self.rows, self.width, seed=0), dtype).requires_grad_()
        weight = _as(_random(self.device, self.vocab, self.width, seed=1, scale=3 / self.width**0.5), dtype)
        bias = None if self.plain else _as(_random(self.device, self.vocab, seed=2), dtype).requires_grad_()
        weight.requires_grad_(not self.frozen)
        slots = 2 * self.rows
        maker = torch.Generator().manual_seed(3)
        targets = torch.randint(self.vocab, (slots,), generator=maker)
        targets[:3], targets[3:5] = torch.tensor([0, self.vocab - 1, -100]), -100
        rows = torch.randint(self.rows, (slots,), generator=maker)
        more: dict[str, Any] = {} if self.plain else {"softcap": 8.0, "return_lse": True, "return_entropy": True}
        found: Any = linear_logprobs(
            hidden, weight, targets.to(self.device), rows=rows.to(self.device), bias=bias, backend=backend, **more
        )
        outputs = found if isinstance(found, tuple) else (found,)
        grads = [_random(self.device, slots, seed=4 + i).to(out.dtype) for i, out in enumerate(outputs)]
        grads[0][::7] = 0
        wanted = {"hidden": hidden, "weight": weight, "bias": bias}
        leaves = {name: leaf for name, leaf in wanted.items() if leaf is not None and leaf.requires_grad}
        gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
        names = ("log-probs", "log-sum-exp", "entropy")
        results = {name: out.detach() for name, out in zip(names, outputs, strict=False)}
        return results | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def _selective(device: torch.device, small: bool) -> Run:
    def run(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        rows, vocab = (9, 301) if small else (200, 50257)
        logits = _as(_random(device, rows, vocab, seed=0, scale=3), dtype).requires_grad_()
        targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
        out = selective_logprobs(logits, targets, temperature=0.7, backend=backend)
        (gradient,) = torch.autograd.grad(out, logits, _random(device, rows, seed=2).to(out.dtype))
        return {"log-probs": out.detach(), "gradient of logits": gradient}

    return run


def sample_groups(longest: int) -> list[Group]:
    """Groups of several shapes: ragged, a response that prefixes another, a single one; responses up to `longest`."""
    maker = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(100, (count,), generator=maker).tolist()

    start = tokens(4)
    responses = [tokens(longest), start + tokens(5), start, start + tokens(longest // 2)]
    return [
        Group(tokens(longest), responses, ranks=[2, 0, 1, 3]),
        Group(tokens(3), [tokens(9), tokens(longest)], ranks=[0, 1]),
        Group(tokens(6), [tokens(7)]),
    ]


def _ranking(device: torch.device, small: bool, budget: int | None) -> Run:
    def run(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        tree = pack_groups(sample_groups(12 if small else 70), device=device)
        width, vocab = (24, 133) if small else (264, 32003)
        hidden = _as(_random(device, tree.num_tokens, width, seed=0), dtype).requires_grad_()
        weight = _as(_random(device, vocab, width, seed=1, scale=3 / width**0.5), dtype).requires_grad_()
        out = linear_ranking_loss(hidden, weight, tree, margin=2.0, logits_budget=budget, backend=backend)
        gradients = torch.autograd.grad(out.loss, [hidden, weight])
        parts = {"loss": out.loss.detach(), "scores": out.scores}
        return parts | {"gradient of hidden": gradients[0], "gradient of weight": gradients[1]}

    return run


def _attention(device: torch.device, size: int, *, window: int | None, softcap: float | None) -> Run:
    def run(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        tree = pack_groups(sample_groups(40), device=device)
        shapes = ((4, 0), (2, 1), (2, 2))
        q, k, v = (_as(_random(device, 1, h, tree.num_tokens, size, seed=s), dtype).requires_grad_() for h, s in shapes)
        positions = None if window is None else tree.position_ids
        out, lse = tree_attention(
            q, k, v, tree.subtree_end, position_ids=positions, window=window, softcap=softcap, return_lse=True,
            backend=backend,
        )  # fmt: skip
        grads = [
            _random(device, *out.shape, seed=5).to(out.dtype),
            _random(device, *lse.shape, seed=6).to(lse.dtype),
        ]
        gradients = torch.autograd.grad([out, lse], [q, k, v], grads)
        parts = {"out": out.detach(), "log-sum-exp": lse.detach()}
        return parts | {f"gradient of {name}": g for name, g in zip("qkv", gradients, strict=True)}

    return run
