"""What a run leaves behind besides the model: its figures as JSON, its curves as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuna.data.files import replacing

Log = Sequence[Mapping[str, float]]


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically; numbers that are not finite become null, which JSON can hold."""
    with replacing(path) as file:
        file.write((json.dumps(finite(content), ensure_ascii=False, indent=1) + "\n").encode())


def finite(value: Any) -> Any:
    """``value`` with every number that is not finite replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def plot_log(path: Path, log: Log) -> None:
    """Picture of a trainer's ``log_history``: the loss and its parts, and the rank accuracy, over steps."""
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
    accuracy.set(xlabel="step", ylabel="pairs ranked right", ylim=(0, 1))
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
