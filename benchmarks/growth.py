"""`python -m benchmarks.growth`: how time and memory of the head grow with rows, vocabulary and width; and with k.

One size is varied at a time, the others stay. Time is to be linear in each; memory above the results (for training
the gradients) flat in rows and vocabulary. `growth.json` holds every sample, `growth.png` the curves,
`growth_fit.json` the exponent of a power law through each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer

from benchmarks.arms import Mode, Shape
from benchmarks.harness import Rounds
from benchmarks.kernels import PACKAGES, Options, compare_logprobs
from benchmarks.record import Comparison
from benchmarks.report import Progress, Report, describe
from benchmarks.sharing import made_groups
from benchmarks.sharing_arms import SharingCase, sharing_arms, small_llama

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIDDLE = Shape(512, 512, 32768)
SWEEPS: dict[str, tuple[int, ...]] = {
    "vocab": (4096, 8192, 16384, 32768, 65536, 131072, 262144),
    "rows": (128, 256, 512, 1024, 2048, 4096),
    "width": (128, 256, 512, 1024, 2048),
}
KS = (2, 4, 8, 16, 32)
ARMS = ("baseline", "tuna cpu")
LOGITS_LIMIT = 2 << 30  # bytes: beyond this the baseline is left out
_MIB = 2**20


@dataclass(frozen=True)
class Fit:
    """A power law `y = a * x**exponent` through one curve (least squares of the logarithms)."""

    arm: str
    varied: str
    figure: str
    exponent: float
    points: list[tuple[int, float]]


def sweep(varied: str, mode: Mode, options: Options, values: tuple[int, ...] | None = None) -> Iterator[Comparison]:
    """Tables of one size varied, each when it is finished; `setting["varied"]` and `["value"]` say which."""
    for value in values or SWEEPS[varied]:
        shape = replace(MIDDLE, **{varied: value})
        arms = ARMS if 4 * shape.rows * shape.vocab <= LOGITS_LIMIT else ARMS[1:]
        table = compare_logprobs(shape, "float32", mode, replace(options, arms=arms))
        yield replace(table, setting={**table.setting, "varied": varied, "value": value, "figure": f"{varied}-{mode}"})


def result_bytes(table: Comparison) -> int:
    """Bytes of the gradients that a training pass returns, 0 for a forward."""
    if table.setting["mode"] == "forward":
        return 0
    shape = Shape.parse(str(table.setting["shape"]))
    return 4 * shape.width * (shape.rows + shape.vocab)


def fits(tables: list[Comparison]) -> list[Fit]:
    """Exponents of CPU time, and of memory above the results, for every arm and size varied."""
    found = []
    figures: dict[str, Callable[[Comparison, str], float | None]] = {"CPU s": _seconds, "MiB above results": _memory}
    for varied in dict.fromkeys(str(table.setting["varied"]) for table in tables):
        for mode in dict.fromkeys(str(table.setting["mode"]) for table in tables):
            chosen = [t for t in tables if (t.setting["varied"], t.setting["mode"]) == (varied, mode)]
            for arm in ARMS:
                for figure, read in figures.items():
                    points = [(int(t.setting["value"]), y) for t in chosen if (y := read(t, arm))]
                    if len(points) > 2:
                        x, y = np.log(np.array(points, dtype=float)).T
                        slope = float(np.polyfit(x, y, 1)[0])
                        found.append(Fit(arm, varied, f"{figure}, {mode}", round(slope, 3), points))
    return found


def _seconds(table: Comparison, arm: str) -> float | None:
    report = next((one for one in table.arms if one.name == arm), None)
    return report.cpu.min if report and report.cpu else None


def _memory(table: Comparison, arm: str) -> float | None:
    report = next((one for one in table.arms if one.name == arm), None)
    return (report.allocator_peak - result_bytes(table)) / _MIB if report and report.allocator_peak else None


def sweep_k(rounds: int, ks: tuple[int, ...] = KS) -> Fit:
    """CPU time of a whole step (tree, small Llama) against k, one prompt of 160 and responses of about 160 tokens.

    The prompt is computed once, so time is linear in `P + kR`, the tokens of the tree: that is what is fitted.
    """
    model = small_llama(layers=2, width=256, vocab=8192)
    arm = {one.name: one for one in sharing_arms()}["tuna tree"]
    points: list[tuple[int, float]] = []
    plan = Rounds()
    for k in ks:
        groups = made_groups(1, k, 160, 160, 8192)
        case = SharingCase(model, groups)
        tokens = 160 + sum(len(response) for response in groups[0].responses)
        arm.call(case)
        times = []
        for _ in range(rounds):
            before = plan.clock()
            arm.call(case)
            times.append(plan.clock()[0] - before[0])
        points.append((tokens, min(times)))
    x, y = np.log(np.array(points, dtype=float)).T
    return Fit("tuna tree", "tokens of the tree", "CPU s, step", round(float(np.polyfit(x, y, 1)[0]), 3), points)


def draw(found: list[Fit], path: Path, title: str) -> None:
    """A panel for each size varied and figure, a line an arm, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((fit.varied, fit.figure) for fit in found))
    columns = 4
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(16, 3.4 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (varied, name) in zip(axes.flat, panels, strict=False):
        _panel(ax, [fit for fit in found if (fit.varied, fit.figure) == (varied, name)], varied, name)
    figure.suptitle(title, fontsize=8, color="#64748b")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(ax: Axes, found: list[Fit], varied: str, name: str) -> None:
    from matplotlib.ticker import NullFormatter

    for fit in found:
        x, y = zip(*fit.points, strict=True)
        colour = "#c2410c" if fit.arm.startswith("tuna") else "#94a3b8"
        ax.loglog(x, y, "o-", color=colour, markersize=3, label=f"{fit.arm}: x^{fit.exponent:.2f}")
    for axis, sizes in ((ax.xaxis, sorted({x for fit in found for x, _ in fit.points})), (ax.yaxis, None)):
        axis.set_minor_formatter(NullFormatter())
        if sizes:
            axis.set_ticks(sizes, [f"{size / 1024:.0f}k" if size >= 4096 else f"{size:.0f}" for size in sizes])
    ax.set_title(name, fontsize=9, loc="left")
    ax.set_xlabel(varied, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylim(bottom=min(min(y for _, y in fit.points) for fit in found) / 3)


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    budget: Annotated[float, typer.Option(help="Seconds after which a slow arm skips rounds beyond the third.")] = 10,
    threads: Annotated[int, typer.Option(help="Threads of torch, OpenMP and BLAS.")] = 2,
    quick: Annotated[bool, typer.Option(help="Three small sizes each: does everything run?")] = False,
    output: Annotated[Path, typer.Option(help="Folder for growth.json, .md, .png, growth_fit.json.")] = Path(
        "results/local"
    ),
) -> None:
    """Measure growth in vocabulary, rows, width and k."""
    torch.set_num_threads(threads)
    told = {"rounds": str(rounds), "budget": str(budget), "threads": str(threads), "quick": str(quick)}
    report = Report("benchmarks.growth", output, "growth", PACKAGES, told)
    modes: tuple[Mode, ...] = ("forward", "trainable")
    with Progress() as progress:
        options = Options(threads, Rounds(rounds, budget), resident=False, progress=progress)
        for varied, values in SWEEPS.items():
            for mode in modes:
                for table in sweep(varied, mode, options, values[:3] if quick else None):
                    report.add(table)
        found = [*fits(report.record.comparisons), sweep_k(rounds, KS[:3] if quick else KS)]
    report.finish(pictures=False)
    draw(found, output / "growth.png", describe(report.record.machine))
    lines = [fit.__dict__ for fit in found]
    (output / "growth_fit.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
