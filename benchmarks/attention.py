"""`python -m benchmarks.attention`: attention over packed groups: ours, a dense mask, k padded copies.

One layer's attention at the sizes of a model, forward and forward + backward, over groups with the lengths of a ranked
file (or of its typical group). Every arm is held against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.arms import needs_backend
from benchmarks.harness import Arm, Rounds, compare
from benchmarks.record import Bound, Comparison
from benchmarks.report import Progress, Report
from benchmarks.step import read_batches
from tuna.models.loading import SMOLLM2
from tuna_kernels import Group, PackedTree, pack_groups
from tuna_kernels.attention.reference import visible
from tuna_kernels.attention.tree_attention import tree_attention

Mode = Literal["forward", "training"]
MODES: tuple[Mode, ...] = get_args(Mode)
TOLERANCE = {"out": 1e-5, "gradient": 1e-4}
LARGEST_MASK = 6000
"""Rows from which a dense mask is not tried: its scores take minutes."""


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads, head size."""

    queries: int
    keys: int
    size: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """ "9x3x64" → 9 query heads on 3 key heads of size 64."""
        try:
            queries, keys, size = (int(part) for part in text.lower().split("x"))
        except ValueError:
            raise ValueError(f"heads {text!r} is not of the form QUERYxKEYxSIZE") from None
        if min(queries, keys, size) < 1 or queries % keys:
            raise ValueError(f"heads {text!r}: sizes must be at least 1, query heads a multiple of key heads")
        return cls(queries, keys, size)


@dataclass(frozen=True)
class AttentionCase:
    """q [1, Hq, T, d], k and v [1, Hkv, T, d] of a packed tree, and an upstream [1, Hq, T, d] of the output."""

    tree: PackedTree
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    mode: Mode

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v."""
        return self.q, self.k, self.v

    @cached_property
    def mask(self) -> Tensor:
        """[T, T] for SDPA: 0 where a row sees another, else -inf. Made once, outside the clock."""
        sees = visible(self.tree.subtree_end)
        return torch.zeros(sees.shape).masked_fill_(~sees, -torch.inf)

    @cached_property
    def copies(self) -> Copies:
        """The same sequences as padded copies."""
        return Copies.of(self)


@dataclass(frozen=True)
class Copies:
    """Each sequence by itself, padded on the right to the longest of N.

    `rows` [N, L] int64 is the packed row of each place, `known` [N, L] bool says that it is no padding, and
    `first` [N, L] bool that no earlier sequence has the row: there its upstream goes.
    """

    rows: Tensor
    known: Tensor
    first: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor

    @classmethod
    def of(cls, case: AttentionCase) -> Copies:
        """Gathered from the packed tensors, outside the clock."""
        paths = sequences(case.tree)
        rows = torch.zeros(len(paths), max(map(len, paths)), dtype=torch.int64)
        known, first = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows, dtype=torch.bool)
        seen: set[int] = set()
        for number, path in enumerate(paths):
            rows[number, : len(path)] = torch.tensor(path)
            known[number, : len(path)] = True
            first[number, : len(path)] = torch.tensor([row not in seen for row in path])
            seen.update(path)
        q, k, v = (x.detach()[0][:, rows].transpose(0, 1).contiguous().requires_grad_() for x in case.inputs)
        upstream = (case.upstream[0][:, rows] * first[..., None]).transpose(0, 1).contiguous()
        return cls(rows, known, first, q, k, v, upstream)

    def packed(self, x: Tensor, places: Tensor, total: int) -> Tensor:
        """Sum of the `places` [N, L] of x [N, H, L, d] by packed row: [1, H, total, d]."""
        result = x.new_zeros(total, x.shape[1], x.shape[3])
        result.index_add_(0, self.rows[places], x.transpose(1, 2)[places])
        return result.transpose(0, 1)[None]


def sequences(tree: PackedTree) -> list[list[int]]:
    """The packed rows of every root-to-leaf path."""
    end, depth = tree.subtree_end.tolist(), tree.position_ids.tolist()
    path: list[int] = []
    found = []
    for row, level in enumerate(depth):
        path = [*path[:level], row]
        if end[row] == row + 1:
            found.append(path)
    return found


def make_case(groups: Sequence[Group], heads: Heads, mode: Mode, seed: int = 0) -> AttentionCase:
    """Random q, k and v, in the layout that a model's projections leave them in."""
    tree, maker = pack_groups(groups), torch.Generator().manual_seed(seed)

    def random(count: int) -> Tensor:
        return torch.randn(1, tree.num_tokens, count, heads.size, generator=maker).transpose(1, 2)

    q, k, v = (random(count).requires_grad_(mode == "training") for count in (heads.queries, heads.keys, heads.keys))
    return AttentionCase(tree, q, k, v, random(heads.queries), mode)


def oracle(case: AttentionCase) -> dict[str, Tensor]:
    """Attention with the whole mask, in float64, group by group."""
    parts = []
    for first, last in pairwise(case.tree.group_rows_host.tolist()):
        own = [x.detach()[:, :, first:last].double().requires_grad_(case.mode == "training") for x in case.inputs]
        end = case.tree.subtree_end[first:last] - first
        out = tree_attention(own[0], own[1], own[2], end, backend="reference")
        parts.append(_with_gradients(out, own, case.upstream[:, :, first:last].double()))
    return {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}


def attention_arms() -> list[Arm[AttentionCase]]:
    """Ours on both backends, SDPA with a dense mask over the packed row, SDPA over padded copies."""

    def ours(backend: str) -> Arm[AttentionCase]:
        def call(case: AttentionCase) -> dict[str, Tensor]:
            out = tree_attention(*case.inputs, case.tree.subtree_end, backend=backend)
            return _with_gradients(out, case.inputs, case.upstream)

        return Arm(f"tuna {backend}", call, f"tree_attention, backend {backend}", refuses=needs_backend(backend))

    def dense(case: AttentionCase) -> dict[str, Tensor]:
        out = F.scaled_dot_product_attention(*case.inputs, attn_mask=case.mask, enable_gqa=True)
        return _with_gradients(out, case.inputs, case.upstream)

    def too_large(case: AttentionCase) -> str:
        rows = case.tree.num_tokens
        return f"a mask of {rows:,} rows squared" if rows > LARGEST_MASK else ""

    def padded(case: AttentionCase) -> tuple[AttentionCase, dict[str, Tensor]]:
        own = case.copies
        out = F.scaled_dot_product_attention(own.q, own.k, own.v, is_causal=True, enable_gqa=True)
        leaves = (own.q, own.k, own.v) if case.mode == "training" else ()
        return case, _with_gradients(out, leaves, own.upstream)

    def packed(answer: tuple[AttentionCase, dict[str, Tensor]]) -> dict[str, Tensor]:
        case, found = answer
        places = {name: case.copies.first if name == "out" else case.copies.known for name in found}
        return {name: case.copies.packed(x, places[name], case.tree.num_tokens) for name, x in found.items()}

    return [
        Arm("sdpa padded", padded, "k padded copies, causal", package="torch", results=packed),
        Arm("sdpa dense", dense, "packed row, [T, T] mask made outside the clock", package="torch", refuses=too_large),
        ours("torch"),
        ours("cpu"),
    ]


def _with_gradients(out: Tensor, inputs: Sequence[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    leaves = {f"gradient:{name}": x for name, x in zip("qkv", inputs, strict=False) if x.requires_grad}
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream) if leaves else ()
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def typical_groups(count: int, seed: int = 0) -> list[Group]:
    """Groups of the lengths usual in ranked files: a prompt of about 80 tokens, five responses of 100 to 400."""
    maker = torch.Generator().manual_seed(seed)

    def tokens(least: int, most: int, first: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=maker))
        return [first, *[0] * (length - 1)]

    return [Group(tokens(40, 120, 1), [tokens(100, 400, i) for i in range(5)], ranks=list(range(5)))
            for _ in range(count)]  # fmt: skip


def run(
    batches: Sequence[Sequence[Group]], modes: Sequence[Mode], heads: Heads, plan: Rounds, progress: Progress
) -> Iterator[Comparison]:
    """All tables, each when it is finished."""
    for groups in batches:
        for mode in modes:
            case = make_case(groups, heads, mode)
            rows, padded = case.tree.num_tokens, sum(len(path) for path in sequences(case.tree))
            title = f"attention, {mode}, {heads.queries} heads on {heads.keys} of {heads.size}, {len(groups)} groups"
            yield compare(
                f"{title}: {rows:,} tokens in the tree, {padded:,} in separate sequences",
                attention_arms(),
                case,
                oracle=oracle(case),
                tolerance=TOLERANCE,
                bounds=[Bound("tuna cpu", {"tuna cpu": 1})],
                plan=plan,
                setting={"groups": len(groups), "tree": rows, "unshared": padded, "mode": mode},
                progress=progress,
            )


def main(
    data: Annotated[
        Path | None, typer.Option(help="Ranked records to take lengths from. Default: typical ones.")
    ] = None,
    groups: Annotated[list[int] | None, typer.Option(help="Groups a batch; may be repeated. Default 2, 16.")] = None,
    heads: Annotated[str, typer.Option(help="QUERYxKEYxSIZE; default: SmolLM2-135M.")] = "9x3x64",
    mode: Annotated[list[str] | None, typer.Option(help="forward or training; may be repeated.")] = None,
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt and response, with --data.")] = 512,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch, OpenMP and BLAS.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder for attention.json, .md and .png.")] = Path("results/local"),
) -> None:
    """Compare ways to compute attention over groups; write JSON, a Markdown table and a picture."""
    if threads < 1:
        raise typer.BadParameter(f"--threads {threads} must be at least 1")
    sizes = sorted(groups or [2, 16])
    if sizes[0] < 1:
        raise typer.BadParameter(f"--groups {sizes[0]} must be at least 1")
    modes = [one for one in MODES if not mode or one in mode]
    if unknown := [one for one in mode or [] if one not in MODES]:
        raise typer.BadParameter(f"--mode {unknown[0]!r} is not one of {', '.join(MODES)}")
    try:
        chosen = Heads.parse(heads)
    except ValueError as error:
        raise typer.BadParameter(f"--heads: {error}") from None
    torch.set_num_threads(threads)
    options = {"data": data.name if data else "", "groups": str(sizes), "heads": heads, "rounds": str(rounds)}
    options |= {"max_length": str(max_length), "threads": str(threads)}
    report = Report("benchmarks.attention", output, "attention", ("torch",), options)
    with Progress() as progress:
        if data is None:
            batches = [typical_groups(size) for size in sizes]
        else:
            batches = read_batches(data, SMOLLM2, "alpaca", max_length, sizes, 0)
        for table in run(batches, modes, chosen, Rounds(rounds, budget=10.0), progress):
            report.add(table)
    report.finish()


if __name__ == "__main__":
    typer.run(main)
