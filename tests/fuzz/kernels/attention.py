"""One random call of ``tree_attention``."""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.fuzz.kernels.drawing import HALF, floats, groups, integers, laid_out
from tests.fuzz.kernels.head import DTYPES, backends, instruction_set
from tests.fuzz.kernels.laws import run, same_bits, within_bounds
from tuna_kernels import pack_groups, tree_attention


def check(rng: random.Random) -> None:
    tree = pack_groups(groups(rng, 1000), share=rng.choice(["tree", "prompt", "none"]))
    dtype, total = rng.choice(DTYPES), tree.num_tokens
    batch, keys = rng.choice([1, 1, 2]), rng.choice([1, 2, 3])
    heads = keys * rng.choice([1, 2, 4])
    size, value_size = rng.choice([1, 3, 8, 16, 40, 64]), rng.choice([1, 8, 16, 64])
    spread = rng.choice([0.0, 1.0, 1.0, 6.0])
    rows = None
    queries = total
    if rng.random() < 0.3:
        queries = rng.choice([0, 1, 7])
        rows = laid_out(rng, integers(rng, 0, total, queries))
    shapes = {
        "q": (batch, heads, queries, size),
        "k": (batch, keys, total, size),
        "v": (batch, keys, total, value_size),
    }
    leaves = {}
    for name, shape in shapes.items():
        leaf = laid_out(rng, floats(rng, *shape, scale=spread).to(dtype))
        leaves[name] = leaf.requires_grad_(rng.random() < 0.8)
    window = rng.choice([None, None, 1, 3, 50])
    options: dict[str, Any] = {
        "window": window,
        "position_ids": None if window is None else laid_out(rng, tree.position_ids),
        "softcap": rng.choice([None, None, 2.0, 50.0]),
        "scale": rng.choice([None, None, 1.0, 0.05, -0.5]),
        "query_rows": rows,
    }
    subtree_end = laid_out(rng, tree.subtree_end)
    backend, isa = (
        rng.choice(backends(dtype, entries=heads * queries * total)),
        rng.choice(["", "avx512", "avx2", "generic"]),
    )
    shown = {k: v for k, v in options.items() if k not in ("position_ids", "query_rows")}
    what = (
        f"tree_attention on {backend} {isa}: {str(dtype)[6:]}, {total} rows, {queries} queries, spread {spread:g}, "
        f"{shown}, "
        + ", ".join(f"{n} {list(x.shape)} {x.stride()}{' grad' if x.requires_grad else ''}" for n, x in leaves.items())
    )
    upstream = [floats(rng, batch, heads, queries, value_size), floats(rng, batch, heads, queries)]
    upstream = [laid_out(rng, u) for u in upstream]

    def results(of: dict[str, torch.Tensor], name: str) -> list[dict[str, torch.Tensor]]:
        return run(
            lambda: tree_attention(
                of["q"], of["k"], of["v"], subtree_end, return_lse=True, backend=name, **options
            ),
            of,
            upstream,
        )  # fmt: skip

    doubles = {n: x.detach().double().clone().requires_grad_(x.requires_grad) for n, x in leaves.items()}
    copies = {n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in leaves.items()}
    truth, book = results(doubles, "reference")[0], results(copies, "reference")[0]
    with instruction_set(isa):
        first, *again = results(leaves, backend)
    for other in again:
        same_bits(first, other, what)
    slope = 1.0 if options["scale"] is None else abs(options["scale"])
    flow = sum(u.abs().max().item() for u in upstream if u.numel()) * (1 + spread) * 4
    largest = 1 + 4 * spread
    scales = {"out 0": largest, "out 1": 1.0, "d v": flow * heads / keys}
    scales |= {"d q": flow * largest**2 * slope, "d k": flow * largest**2 * slope * heads / keys}
    if dtype == torch.float64:  # no better truth to compare with: both round scores of this size
        scales = {name: x * max(1.0, spread**2 * size * slope) for name, x in scales.items()}
    if backend == "triton" and dtype in HALF:  # weights are rounded before they are multiplied with values
        scales["out 0"] *= torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 8
    # The backward takes out as it was rounded (docs/numerics.md).
    within_bounds(first, [book], truth, scales, dtype if dtype in HALF else torch.float32, what)
