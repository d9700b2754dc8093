"""The pictures of a recipe's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuna.system.writing import replacing

__all__ = ["accuracy_picture", "histogram_picture", "training_picture"]


def histogram_picture(path: Path, values: Mapping[str, Sequence[float]], label: str) -> None:
    """One histogram per name, over shared bins."""
    figure, axes = _figure(1)
    given = [item for item in values.values() if len(item)]
    bins = np.histogram_bin_edges(np.concatenate([np.asarray(item, float) for item in given]), bins=24)
    for name, item in values.items():
        if len(item):
            axes[0].hist(item, bins=bins, alpha=0.6, label=f"{name} ({len(item)})")
    axes[0].set(xlabel=label, ylabel="responses")
    axes[0].legend(frameon=False)
    _save(figure, path)


def accuracy_picture(path: Path, bars: Mapping[str, float]) -> None:
    """One bar per name; the dashed line is chance level."""
    figure, axes = _figure(1, height=0.8 + 0.42 * len(bars))
    names = list(bars)[::-1]
    axes[0].barh(names, [bars[name] for name in names], color="tab:blue", alpha=0.8)
    axes[0].axvline(0.5, color="black", linestyle="--", linewidth=1)
    axes[0].set(xlabel="pairs ranked as the data does", xlim=(0, 1))
    _save(figure, path)


def training_picture(path: Path, logs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Loss and pair accuracy over the steps of each training run."""
    figure, axes = _figure(2)
    for name, log in logs.items():
        color = None
        for panel, key in ((axes[0], "loss"), (axes[1], "rank/accuracy")):
            for prefix, style in (("", "-"), ("eval_", "o")):
                points = [(line["step"], line[prefix + key]) for line in log if prefix + key in line]
                if points:
                    label = f"{name}{', held out' if prefix else ''}"
                    (drawn,) = panel.plot(*zip(*points, strict=True), style, color=color, label=label)
                    color = drawn.get_color()
    axes[0].set(xlabel="step", ylabel="loss")
    axes[1].set(xlabel="step", ylabel="pairs ranked correctly", ylim=(0, 1))
    for panel in axes:
        if panel.lines:
            panel.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _figure(panels: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels + 1.4, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
