"""Ranked records for people to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tuna.console.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuna.data.records import Record

__all__ = ["best_and_worst"]


def best_and_worst(records: Sequence[Record], count: int = 3, width: int = 160) -> Table:
    """A table of the best and the worst response of the first `count` ranked records.

    A reversed order is silent in every number of a training run, and plain to see here.
    """
    table = Table(title="Is the better one really better?", show_lines=True, title_justify="left")
    for column in ("record", "prompt", "best", "worst"):
        table.add_column(column, overflow="fold")
    ranked = [record for record in records if max(record.dense_ranks()) > 0]
    for record in ranked[:count]:
        prompt = record.prompt if record.prompt is not None else (record.messages or [])[-1].content
        cells = map(visible, (record.id, prompt, _judged(record, record.best()), _judged(record, record.worst())))
        # Text, not str: rich would read [brackets] in data as mark-up.
        table.add_row(*(Text(cell if len(cell) <= width else cell[: width - 1] + "…") for cell in cells))
    return table


def _judged(record: Record, index: int) -> str:
    if record.scores is not None:
        return f"({record.scores[index]:g}) {record.responses[index]}"
    return f"(rank {(record.ranks or [0])[index]}) {record.responses[index]}"
