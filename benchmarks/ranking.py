"""The whole ranking loss over given hidden states: ours in one call, beside the baseline; one `RankingCase`
for both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arms import Mode, Shape, make_case, needs_backend, tolerance
from benchmarks.harness import Arm
from tuna_kernels import Group, PackedTree, linear_ranking_loss, pack_groups

CANDIDATES = 5
PROMPT = 4
MARGIN = 0.1
SMALL_BUDGETS = (48 << 20, 24 << 20)
"""Bytes of logits kept: two groups or one of them at this shape."""
RANKING_MODES: tuple[Mode, ...] = ("trainable", "frozen")


@dataclass(frozen=True)
class RankingCase:
    """hidden [T, D], weight [V, D], a packed tree of T tokens, and the mode ("trainable" or "frozen" head).

    Margin 0.1, length penalty 1, likelihood weight 1, preset "released": all candidates carry gradient, so
    nothing is skipped and the figures show the arithmetic alone.
    """

    hidden: Tensor
    weight: Tensor
    tree: PackedTree
    mode: Mode


def make_ranking_case(shape: Shape, dtype: str, mode: Mode, *, seed: int = 0) -> RankingCase:
    """Groups of 5 candidates with together about `shape.rows` response tokens, and random hidden states for
    them."""
    if mode not in RANKING_MODES:
        raise ValueError(f"mode = {mode!r} makes no ranking case; it has {RANKING_MODES}")
    maker = torch.Generator().manual_seed(seed)
    num_groups = max(1, shape.rows // 160)
    length = max(1, shape.rows // (num_groups * CANDIDATES))
    groups = []
    for _ in range(num_groups):
        prompt = torch.randint(shape.vocab, (PROMPT,), generator=maker).tolist()
        responses = torch.randint(shape.vocab, (CANDIDATES, length), generator=maker).tolist()
        groups.append(Group(prompt, responses, ranks=torch.randperm(CANDIDATES, generator=maker).tolist()))
    tree = pack_groups(groups)
    case = make_case(replace(shape, rows=tree.num_tokens), dtype, mode, seed=seed)
    return RankingCase(case.hidden, case.weight, tree, mode)


def scored_rows(tree: PackedTree) -> Tensor:
    """int64 [N]: the distinct rows of the tree that serve a slot."""
    return torch.bincount(tree.rows, minlength=tree.num_tokens).nonzero()[:, 0]


def baseline_loss(hidden: Tensor, weight: Tensor, tree: PackedTree) -> Tensor:
    """Released preset by plain torch: logits of every slot, log_softmax, gather, means, pairs by rank
    difference."""
    logprobs = F.linear(hidden[tree.rows], weight).log_softmax(dim=-1)
    token = logprobs.gather(1, tree.targets[:, None])[:, 0].to(torch.promote_types(hidden.dtype, torch.float32))
    offsets, bounds = tree.candidate_offsets.tolist(), tree.group_offsets.tolist()
    scores = torch.stack([token[a:b].mean() for a, b in pairwise(offsets)])
    by_lag: dict[int, list[Tensor]] = {}
    for first, last in pairwise(bounds):
        for i in range(first, last):
            for j in range(first, last):
                lag = int(tree.ranks[j] - tree.ranks[i])
                if lag > 0:
                    by_lag.setdefault(lag, []).append(F.relu(MARGIN * lag - (scores[i] - scores[j])))
    ranking = sum((torch.stack(pairs).mean() for pairs in by_lag.values()), scores.new_zeros(()))
    return ranking - token.mean()


def ranking_oracle(case: RankingCase) -> dict[str, Tensor]:
    """Loss and gradients of the baseline in float64."""
    hidden = case.hidden.detach().double().requires_grad_()
    weight = case.weight.detach().double().requires_grad_(case.mode == "trainable")
    return _with_gradients(baseline_loss(hidden, weight, case.tree), hidden, weight)


def ranking_tolerance(dtype: str, vocab: int) -> dict[str, float]:
    """As `benchmarks.arms.tolerance`: the loss is a mean of log-probs, its gradient that of one."""
    limits = tolerance(dtype, vocab)
    return {"loss": limits["logprobs"], "gradient": limits["gradient"]}


def ranking_arms(*backends: str) -> list[Arm[RankingCase]]:
    """The baseline, and ours on `backends` (default: those of the CPU, the native one also with little memory)."""

    def with_gradients(case: RankingCase) -> dict[str, Tensor]:
        return _with_gradients(baseline_loss(case.hidden, case.weight, case.tree), case.hidden, case.weight)

    def ours(backend: str, budget: int | None = None) -> Arm[RankingCase]:
        def call(case: RankingCase) -> dict[str, Tensor]:
            output = linear_ranking_loss(
                case.hidden,
                case.weight,
                case.tree,
                preset="released",
                margin=MARGIN,
                backend=backend,
                logits_budget=budget,
            )
            return _with_gradients(output.loss, case.hidden, case.weight)

        size = "" if budget is None else f", {budget >> 20} MiB"
        note = f"linear_ranking_loss, backend {backend}, logits_budget {size[2:] or 'as it is'}"
        return Arm(f"tuna {backend}{size}", call, note, refuses=needs_backend(backend))

    baseline = Arm("baseline", with_gradients, "logits of every slot, log_softmax, gather, pairs", package="torch")
    if backends:
        return [baseline, *map(ours, backends)]
    return [baseline, ours("torch"), ours("cpu"), *(ours("cpu", budget) for budget in SMALL_BUDGETS)]


def _with_gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    inputs = {"gradient:hidden": hidden, "gradient:weight": weight}
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}
