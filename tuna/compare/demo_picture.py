"""The demo's picture: what was learned above, what a step takes below."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tuna.system.writing import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, THEIRS, SECOND, INK = "#c2410c", "#94a3b8", "#0f766e", "#334155"
NAMES = {"tuna": "Tuna", "baseline": "baseline"}
GIB = 2**30


def draw_demo(results: Mapping[str, Any], path: Path) -> None:
    """Four panels from what `tuna.compare.demo.run_demo` found: loss, held-out accuracy, time and memory of a step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, accuracy), (seconds, memory) = figure.subplots(2, 2)
    _draw_loss(loss, results["training"]["log"])
    _draw_accuracy(accuracy, results["training"], results["groups"]["held_out"])
    _draw_times(seconds, results["costs"])
    _draw_memory(memory, results["costs"])
    for axes in (loss, accuracy, seconds, memory):
        axes.spines[["top"] if axes is loss else ["top", "right"]].set_visible(False)
        axes.tick_params(axis="x" if axes is loss else "both", labelsize=9, colors=INK)
        axes.xaxis.label.set(size=9, color=INK)
    settings = results["settings"]
    figure.suptitle(
        f"{settings['model']}: {settings['steps']} steps of {settings['groups']} ranked groups, preset "
        f"{settings['preset']}; {results['machine']['threads']} threads",
        fontsize=11,
        color=INK,
    )
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, color=INK, fontweight="bold")


def _draw_loss(axes: Axes, log: list[dict[str, float]]) -> None:
    _title(axes, "Training loss")
    for name, label, colour, own in (
        ("loss/rank", "ranking", OURS, axes),
        ("loss/mle", "cross-entropy (nats a token)", SECOND, axes.twinx()),
    ):
        points = [(line["step"], line[name]) for line in log if name in line and "loss" in line]
        own.plot(*zip(*points, strict=True), color=colour, linewidth=1.8)
        own.set_ylabel(label)
        own.yaxis.label.set(size=9, color=colour)
        own.tick_params(axis="y", labelsize=9, colors=colour)
        own.spines[["top"]].set_visible(False)
    axes.set(xlabel="step", ylim=(0, None))
    axes.grid(alpha=0.25)


def _draw_accuracy(axes: Axes, training: Mapping[str, Any], groups: int) -> None:
    _title(axes, f"Pairs ranked right in {groups} held-out groups")
    name = "eval_rank/accuracy"
    lines = [{"step": 0, **training["before"]}, *training["log"]]
    points = [(line["step"], line[name]) for line in lines if name in line]
    if not points:
        axes.text(0.5, 0.5, "no ranked pair is held out", ha="center", color=INK, transform=axes.transAxes)
        return
    axes.axhline(0.5, color=THEIRS, linestyle=":", linewidth=1.2)
    axes.plot(*zip(*points, strict=True), color=OURS, marker="o", linewidth=1.8)
    for step, value in (points[0], points[-1]):
        axes.annotate(f"{value:.0%}", (step, value), (0, 9), textcoords="offset points", ha="center", color=INK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    values = [value for _, value in points]
    axes.set(xlabel="step", ylim=(max(0, min([0.45, *values]) - 0.08), min(1.05, max([0.6, *values]) + 0.12)))
    axes.grid(alpha=0.25)


def _draw_times(axes: Axes, costs: Mapping[str, Any]) -> None:
    seconds = {way: median(cost["wall"]) for way, cost in costs.items()}
    _title(axes, f"Time of a step: {seconds['baseline'] / seconds['tuna']:.1f}x as fast as the baseline")
    labels = {way: f"{seconds[way]:.2f} s\n{costs[way]['tokens']:,} tokens" for way in costs}
    _bars(axes, seconds, labels)
    axes.set_xlabel(f"seconds, median over {len(costs['tuna']['wall'])} batches; tokens of all of them")


def _draw_memory(axes: Axes, costs: Mapping[str, Any]) -> None:
    growth = {way: cost["growth"] / GIB for way, cost in costs.items()}
    _title(axes, f"Memory of a step: {growth['tuna'] / growth['baseline']:.0%} of the baseline's")
    labels = {way: f"{size(costs[way]['growth'])}\n{size(costs[way]['process'])} in all" for way in costs}
    _bars(axes, growth, labels)
    axes.set_xlabel("GiB above weights and optimizer state, peak of a fresh process")


def size(number: float) -> str:
    """Bytes for people: "1.23 GiB", "17.3 MiB"."""
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / 2**20:.1f} MiB"


_ORDER = ("baseline", "tuna")


def _bars(axes: Axes, values: Mapping[str, float], labels: Mapping[str, str]) -> None:
    for place, way in enumerate(_ORDER):
        axes.barh(place, values[way], color=OURS if way == "tuna" else THEIRS, height=0.6)
        offset, align = ((8, 0), "left") if values[way] < 0.6 * max(values.values()) else ((-8, 0), "right")
        colour = INK if align == "left" else "white"
        axes.annotate(
            labels[way], (values[way], place), offset, textcoords="offset points", ha=align, va="center", color=colour
        )
    axes.set_yticks(range(len(_ORDER)), [NAMES[way] for way in _ORDER])
    axes.invert_yaxis()
