"""`python -m benchmarks.kernels`: log-prob kernels and the whole ranking loss, beside peers, in one run.

For each shape and dtype: forward, forward + backward with a trainable head, the same with every second upstream zero,
forward + backward with a frozen head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks import ranking
from benchmarks.arms import DTYPES, MODES, Case, Mode, Shape, dtype_name, logprob_arms, make_case, oracle, tolerance
from benchmarks.harness import Rounds, compare
from benchmarks.record import Bound, Comparison
from benchmarks.report import Progress, Report
from tuna.compare import memory_meter

DEFAULT_SHAPES = ("1024x768x32768", "1024x576x49152", "512x4096x32000", "512x896x151936")
QUICK_SHAPES = ("64x32x512",)
WARM_ROWS = 32
PACKAGES = ("liger-kernel", "cut-cross-entropy", "trl", "triton")
HALF = ", half the rows"
NO_ZERO = "tuna cpu, no upstream zero"


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    threads: int
    plan: Rounds
    arms: tuple[str, ...] = ()
    resident: bool = True
    progress: Callable[[str], None] = lambda _: None


def bare_multiplies(
    hidden: Tensor, weight: Tensor, suffix: str = "", dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], object]]:
    """The three matrix multiplies of a head, alone: in `dtype`, results written into buffers that are already
    there. `suffix` is put behind their names.

    float32 whatever the input type: on a CPU that emulates half-precision products they are what can be
    reached.
    """
    x, w = hidden.detach().to(dtype), weight.detach().to(dtype)
    logits, d_x, d_w = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)
    return {
        f"mm logits{suffix}": lambda: torch.mm(x, w.T, out=logits),
        f"mm d_hidden{suffix}": lambda: torch.mm(logits, w, out=d_x),
        f"mm d_weight{suffix}": lambda: torch.mm(logits.T, x, out=d_w),
    }


def units_of(case: Case) -> dict[str, Callable[[], object]]:
    """The bare multiplies; with half of the upstreams zero also those of half the rows, and our own pass without any
    zero, so that what skipping saves is read off one run."""
    whole = bare_multiplies(case.hidden, case.weight)
    if case.mode != "half":
        return whole
    half = bare_multiplies(case.hidden[::2], case.weight, HALF)
    full = make_case(case.shape, dtype_name(case), "trainable")
    ours = {arm.name: arm for arm in logprob_arms()}["tuna cpu"]
    own = {} if ours.refuses(full) else {NO_ZERO: lambda: ours.call(full)}
    return whole | half | own


def bounds_of(shape: Shape, dtype: str, mode: Mode) -> list[Bound]:
    """The yardsticks of a mode; the first is the one that tables rank by.

    Memory is that of the multiplies' own results in the input type: one block of logits and the gradients.
    """
    size = DTYPES[dtype].itemsize
    logits = shape.rows * shape.vocab * size
    d_hidden, d_weight = shape.rows * shape.width * size, shape.vocab * shape.width * size
    z, x, w = "mm logits", "mm d_hidden", "mm d_weight"
    if mode == "forward":
        return [Bound("1 mm", {z: 1}, logits)]
    if mode == "trainable":
        held = logits + d_hidden + d_weight
        return [
            Bound("4 mm (recompute)", {z: 2, x: 1, w: 1}, held),
            Bound("3 mm (baseline)", {z: 1, x: 1, w: 1}, held),
        ]
    if mode == "half":
        held = logits + d_hidden + d_weight
        least = {z: 1, z + HALF: 1, x + HALF: 1, w + HALF: 1}
        return [Bound("2.5 mm (half recomputed)", least, held), Bound("without zeros", {NO_ZERO: 1})]
    held = logits + d_hidden
    return [
        Bound("3 mm (recompute)", {z: 2, x: 1}, held),
        Bound("2 mm (unit gradient)", {z: 1, x: 1}, held),
    ]


def compare_logprobs(shape: Shape, dtype: str, mode: Mode, options: Options) -> Comparison:
    """One table: all log-prob arms at one shape, dtype and mode."""
    case = make_case(shape, dtype, mode)
    arms = [arm for arm in logprob_arms() if not options.arms or arm.name in options.arms]
    meter = functools.partial(_resident, "logprobs", shape, dtype, mode, options.threads)
    return compare(
        f"log-probs, {_describe(mode)}, {dtype}, N={shape.rows} D={shape.width} V={shape.vocab}",
        arms,
        case,
        oracle=oracle(case),
        tolerance=tolerance(dtype, shape.vocab),
        units=units_of(case),
        bounds=bounds_of(shape, dtype, mode),
        plan=options.plan,
        resident=meter if options.resident else None,
        setting={"op": "logprobs", "mode": mode, "dtype": dtype, "shape": str(shape), "figure": f"{shape}-{dtype}"},
        progress=options.progress,
    )


def compare_ranking(shape: Shape, dtype: str, mode: Mode, options: Options) -> Comparison:
    """One table: the whole ranking loss, ours beside the baseline."""
    case = ranking.make_ranking_case(shape, dtype, mode)
    rows = case.hidden[ranking.scored_rows(case.tree)]
    scored = Shape(len(rows), shape.width, shape.vocab)
    meter = functools.partial(_resident, "ranking", shape, dtype, mode, options.threads)
    return compare(
        f"ranking loss, {_describe(mode)}, {dtype}, {case.tree.num_groups} groups of {ranking.CANDIDATES}, "
        f"{case.tree.num_slots} slots on {scored.rows} rows, D={shape.width} V={shape.vocab}",
        ranking.ranking_arms(),
        case,
        oracle=ranking.ranking_oracle(case),
        tolerance=ranking.ranking_tolerance(dtype, shape.vocab),
        units=bare_multiplies(rows, case.weight),
        bounds=bounds_of(scored, dtype, mode),
        plan=options.plan,
        resident=meter if options.resident else None,
        setting={"op": "ranking", "mode": mode, "dtype": dtype, "shape": str(shape), "figure": f"{shape}-{dtype}"},
        progress=options.progress,
    )


def resident_peak_of(op: str, arm: str, shape: str, dtype: str, mode: Mode) -> memory_meter.ResidentPeak:
    """Run in a fresh process: memory of one arm, after a call on few rows (imports,
    compilation)."""
    size = Shape.parse(shape)
    few = Shape(min(size.rows, WARM_ROWS), size.width, size.vocab)
    if op == "ranking":
        chosen = {one.name: one for one in ranking.ranking_arms()}[arm]
        chosen.call(ranking.make_ranking_case(few, dtype, mode))
        case = ranking.make_ranking_case(size, dtype, mode)
        return memory_meter.resident_peak(lambda: chosen.call(case))
    peer = {one.name: one for one in logprob_arms()}[arm]
    peer.call(make_case(few, dtype, mode))
    inputs = make_case(size, dtype, mode)
    return memory_meter.resident_peak(lambda: peer.call(inputs))


def _resident(op: str, shape: Shape, dtype: str, mode: Mode, threads: int, arm: str) -> memory_meter.ResidentPeak:
    arguments = {"op": op, "arm": arm, "shape": str(shape), "dtype": dtype, "mode": mode}
    return memory_meter.ResidentPeak(
        *memory_meter.in_fresh_process("benchmarks.kernels:resident_peak_of", arguments, threads=threads)
    )


def _describe(mode: Mode) -> str:
    return {
        "forward": "forward",
        "trainable": "forward + backward, trainable head",
        "half": "forward + backward, trainable head, half of the upstreams zero",
        "frozen": "forward + backward, frozen head",
    }[mode]


def run(
    cases: Sequence[tuple[Shape, str]], modes: Sequence[Mode], options: Options, *, with_ranking: bool = True
) -> Iterator[Comparison]:
    """All tables of some (shape, dtype), in order, each when it is finished."""
    for shape, dtype in cases:
        for mode in modes:
            yield compare_logprobs(shape, dtype, mode, options)
        for mode in modes:
            if with_ranking and mode in ranking.RANKING_MODES:
                yield compare_ranking(shape, dtype, mode, options)


def choose_cases(shapes: Sequence[str] | None, dtypes: Sequence[str] | None, quick: bool) -> list[tuple[Shape, str]]:
    """Every shape in every dtype. By default bfloat16 at the first shape only: on a CPU that emulates it, peers that
    multiply in bfloat16 take six times as long, and more shapes would say the same."""
    if shapes or dtypes or quick:
        named = shapes or (QUICK_SHAPES if quick else DEFAULT_SHAPES)
        return [(Shape.parse(name), dtype) for name in named for dtype in dtypes or ("float32", "bfloat16")]
    first, *others = [Shape.parse(name) for name in DEFAULT_SHAPES]
    return [(first, "float32"), (first, "bfloat16"), *((shape, "float32") for shape in others)]


def main(
    shape: Annotated[list[str] | None, typer.Option(help="ROWSxWIDTHxVOCAB; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; may be repeated.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="forward, trainable, half or frozen; may be repeated.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only these log-prob arms; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    budget: Annotated[float, typer.Option(help="Seconds after which a slow arm skips rounds beyond the third.")] = 60,
    threads: Annotated[int, typer.Option(help="Threads of torch, OpenMP and BLAS.")] = 2,
    resident: Annotated[bool, typer.Option(help="Measure process memory, each arm in a fresh process.")] = True,
    with_ranking: Annotated[bool, typer.Option("--ranking/--no-ranking", help="The ranking-loss tables too.")] = True,
    quick: Annotated[bool, typer.Option(help="A tiny shape and two rounds: does everything run?")] = False,
    output: Annotated[Path, typer.Option(help="Folder for kernels.json, .md and .png.")] = Path("results/local"),
) -> None:
    """Compare log-prob kernels and ranking losses; write JSON, a Markdown table and pictures."""
    if threads < 1:
        raise typer.BadParameter(f"--threads {threads} must be at least 1")
    torch.set_num_threads(threads)
    _one_of("dtype", dtype or [], tuple(DTYPES))
    _one_of("mode", mode or [], MODES)
    _one_of("arm", arm or [], tuple(one.name for one in logprob_arms()))
    try:
        cases = choose_cases(shape, dtype, quick)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    modes = [one for one in MODES if one in (mode or MODES)]
    plan = Rounds(rounds=2 if quick else rounds, budget=budget)
    told = {"rounds": plan.rounds, "budget": budget, "threads": threads, "quick": quick}
    report = Report("benchmarks.kernels", output, "kernels", PACKAGES, {name: str(told[name]) for name in told})
    with Progress() as progress:
        options = Options(threads, plan, tuple(arm or ()), resident and not quick, progress)
        for comparison in run(cases, modes, options, with_ranking=with_ranking):
            report.add(comparison)
    report.finish()


def _one_of(option: str, given: list[str], allowed: tuple[str, ...]) -> None:
    for name in given:
        if name not in allowed:
            raise typer.BadParameter(f"--{option} {name!r} is not one of {', '.join(map(repr, allowed))}")


if __name__ == "__main__":
    typer.run(main)
