"""Stacked bars of a GPU's memory use by part, with a line at its capacity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tuna.plan.planner import GIB, Plan
from tuna.system.writing import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_bars", "draw_plans"]

COLOURS = {
    "weights": "#1e3a5f",
    "gradients": "#0f766e",
    "float32 gradients": "#5eaaa2",
    "optimizer": "#64748b",
    "buffers": "#a8b3c2",
    "activations": "#c2410c",
    "layer at work": "#f0a070",
    "head": "#7c1d1d",
    "allowance": "#e2e8f0",
}
INK = "#334155"
NAMES = {
    "baseline": "baseline",
    "unshared": "fused head, no sharing",
    "one_pass": "Tuna, one pass",
    "two_phase": "Tuna, two-phase",
}


def draw_plans(path: Path, title: str, plans: Mapping[str, Plan]) -> None:
    """Draw a bar for each labelled plan, and a line at the capacity of their card."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.8 + 0.62 * len(plans)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    capacities = {plan.capacity / GIB: plan.request.card.label for plan in plans.values()}
    draw_bars(axes, {label: plan.parts() for label, plan in plans.items()}, capacities)
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)


def draw_bars(axes: Axes, bars: Mapping[str, Mapping[str, int]], capacities: Mapping[float, str]) -> None:
    """Draw horizontal stacks of bytes by part, and a line at each capacity (GiB, with its label)."""
    names = [name for name in COLOURS if any(parts.get(name) for parts in bars.values())]
    left = [0.0] * len(bars)
    for name in names:
        widths = [parts.get(name, 0) / GIB for parts in bars.values()]
        axes.barh(range(len(bars)), widths, left=left, color=COLOURS[name], label=name, height=0.62)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(f"{total:.1f}", (total, place), (5, 0), textcoords="offset points", va="center", color=INK)
    for capacity, label in capacities.items():
        axes.axvline(capacity, color="#b91c1c", linestyle="--", linewidth=1.3)
        axes.annotate(
            label, (capacity, 1), (3, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=8, color="#b91c1c", ha="right",
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel("GiB on each GPU at the peak")
    axes.set_xlim(0, 1.12 * max([*left, *capacities]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
