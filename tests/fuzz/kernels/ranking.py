"""One random call of ``linear_ranking_loss``."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.kernels.drawing import groups, laid_out
from tests.fuzz.kernels.head import (
    backends,
    gradient_scales,
    instruction_set,
    leaves_of,
    references,
    rounded_in,
    size_of_logits,
)
from tests.fuzz.kernels.laws import run, same_bits, within_bounds
from tuna_kernels import PackedTree, linear_ranking_loss, pack_groups
from tuna_kernels.loss_counts import ranked_pairs


@dataclass
class RankingCase:
    tree: PackedTree
    options: dict[str, Any]

    def call(self, leaves: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        lora = (leaves["lora_a"], leaves["lora_b"], 0.5) if "lora_a" in leaves else None
        out = linear_ranking_loss(
            leaves["hidden"], leaves["weight"], self.tree, bias=leaves.get("bias"), lora=lora, backend=backend,
            **self.options,
        )  # fmt: skip
        return out.loss, out.ranking, out.mle, out.scores, out.logprobs


def near_a_hinge(scores: Tensor, case: RankingCase) -> bool:
    """Whether some pair's hinge is so near 0 that rounding decides whether it is open."""
    better, worse = ranked_pairs(case.tree.ranks, case.tree.group_offsets)
    lag = (case.tree.ranks[worse] - case.tree.ranks[better]).double()
    hinge = case.options["margin"] * lag - (scores[better] - scores[worse])
    size = 1 + scores[better].abs() + scores[worse].abs()
    return bool(((hinge.abs() / size) < 1e-3).any()) or not bool(scores.isfinite().all())


def check(rng: random.Random) -> None:
    vocabulary, width = rng.choice([5, 17, 300, 2049]), rng.choice([1, 8, 33])
    tree = pack_groups(groups(rng, vocabulary), share=rng.choice(["tree", "prompt", "none"]))
    spread = rng.choice([0.0, 1.0, 10.0]) / width**0.5
    scale = rng.choice([1.0, 1.0, 0.3, -2.0, 50.0])
    leaves = leaves_of(rng, tree.num_tokens, vocabulary, width, spread, scale)
    options: dict[str, Any] = {
        "preset": rng.choice(["paper", "released"]),
        "margin": rng.choice([0.0, 0.1, 2.0, 1000.0]),
        "length_penalty": rng.choice([1.0, 0.0, 1.3]),
        "mle_weight": rng.choice([1.0, 0.0, 0.3]),
        "logits_budget": rng.choice([None, 0, 4 * vocabulary * 60]),
        "logit_scale": scale,
        "softcap": rng.choice([None, None, 5.0, 100.0]),
    }
    tree = replace(tree, rows=laid_out(rng, tree.rows), targets=laid_out(rng, tree.targets))
    case = RankingCase(tree, options)
    sizes = ", ".join(
        f"{n} {str(x.dtype)[6:]} {x.stride()}{' grad' if x.requires_grad else ''}" for n, x in leaves.items()
    )
    dtypes = [leaf.dtype for leaf in leaves.values()]
    backend, isa = (
        rng.choice(backends(*dtypes, entries=tree.num_slots * vocabulary)),
        rng.choice(["", "avx512", "avx2", "generic"]),
    )
    what = (
        f"linear_ranking_loss on {backend} {isa}: {tree.num_candidates} candidates of {tree.num_groups} groups, "
        f"{tree.num_tokens} rows, [{vocabulary}, {width}], {sizes}, {options}"
    )
    upstream = [torch.tensor(rng.choice([1.0, 1e-3, -2.0])), *[torch.zeros(())] * 4]
    doubles = {n: x.detach().double().clone().requires_grad_(x.requires_grad) for n, x in leaves.items()}
    (truth, *_) = run(lambda: case.call(doubles, "reference"), doubles, upstream)
    books = references(case, leaves, upstream, rng)
    with instruction_set(isa):
        first, *again = run(lambda: case.call(leaves, backend), leaves, upstream)
        rounded = rounded_in(dtypes, backend)
    for other in again:
        same_bits(first, other, what)
    if near_a_hinge(truth["out 3"], case):
        drop = [n for n in truth if n.startswith("d ")]
        for results in (first, truth, *books):
            for name in drop:
                results.pop(name, None)
    scores = truth["out 3"]
    largest = scores[scores.isfinite()].abs().max().item() if bool(scores.isfinite().any()) else 0.0
    pairs = tree.num_candidates * max(1.0, largest + options["margin"] * tree.num_candidates)
    per_row = int(tree.rows.bincount().max()) if tree.num_slots else 1
    size = abs(float(upstream[0])) * per_row * tree.num_candidates * abs(scale)
    logprobs = truth["out 4"]
    logits = size_of_logits(leaves, scale, 0.5)
    size *= logits
    each = max(logits, logprobs[logprobs.isfinite()].abs().max().item() if bool(logprobs.isfinite().any()) else 0.0)
    scales = {"out 0": pairs, "out 1": pairs, "out 2": each, "out 3": max(each, largest), "out 4": each}
    within_bounds(first, books, truth, scales | gradient_scales(leaves, size), rounded, what)
