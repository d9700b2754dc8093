"""A progress bar with rate and time left. Apart from the trainer's, so that it is quick to import."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class RateColumn(ProgressColumn):
    """Units done per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The rate, or nothing before there is one."""
        return Text("" if task.speed is None else f"{task.speed:,.4g} {self.unit}/s", style="progress.data.speed")


def progress_bar(console: Console, unit: str, *more: ProgressColumn) -> Progress:
    """A bar with counts, rate in `unit` per second, time gone, time left, and `more` columns."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *more,
        console=console,
        speed_estimate_period=600.0,  # rich's 30 seconds know no rate for a step that takes longer
    )
