"""A plot of the curves of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuna.system.writing import replacing

Log = Sequence[Mapping[str, float]]


def plot_log(path: Path, log: Log) -> None:
    """Plot a trainer's `log_history`: the loss and its parts, and the rank accuracy, over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracy = figure.subplots(1, 2)
    for name, label in (("loss", "loss"), ("loss/rank", "ranking"), ("loss/mle", "likelihood")):
        _curve(losses, log, name, label)
    _curve(losses, log, "eval_loss", "loss, held out", marker="o")
    _curve(accuracy, log, "rank/accuracy", "training batches")
    _curve(accuracy, log, "eval_rank/accuracy", "held out", marker="o")
    losses.set(xlabel="step", ylabel="loss", ylim=(0, None))
    accuracy.set(xlabel="step", ylabel="pairs ranked correctly", ylim=(0, 1))
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _curve(axes: Any, log: Log, name: str, label: str, marker: str | None = None) -> None:
    points = [(line["step"], line[name]) for line in log if name in line]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker=marker)
