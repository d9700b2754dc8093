"""`python -m benchmarks.diff OLD.json NEW.json`: two runs of the same program side by side; flags regressions.

Tables are matched by title, arms by name. Compared is what travels between machines and days: the ratio of CPU time
to the bound of the same round (CPU seconds where a table has no bound), and the peak of torch's allocator. A time
counts as changed when its median moved by more than `--threshold` *and* the smallest and largest of the two runs do
not overlap: a shift within the spread of the rounds is noise. Memory is exact, so there the threshold alone decides.
Exits with 1 when anything got worse, an arm went missing or is no longer right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from benchmarks.record import ArmReport, Comparison, Record, Spread, read_record

Verdict = Literal["same", "better", "worse", "gone", "new", "broken"]
BAD: tuple[Verdict, ...] = ("worse", "gone", "broken")
_STYLES = {"worse": "bold red", "gone": "red", "broken": "bold red", "better": "green", "new": "cyan"}


@dataclass(frozen=True)
class Change:
    """One figure of one arm in both runs; `ratio` is new over old (0 where one of them is missing)."""

    title: str
    arm: str
    figure: str
    old: float
    new: float
    ratio: float
    verdict: Verdict


def changes(old: Record, new: Record, threshold: float = 0.05) -> Iterator[Change]:
    """Every figure that both records have, and every arm that only one of them has.

    Raises:
        ValueError: records of different programs, or a threshold that is no positive share.
    """
    if old.program != new.program:
        raise ValueError(f"{old.program} and {new.program} are different programs: nothing to compare")
    if not threshold > 0:
        raise ValueError(f"threshold = {threshold} must be positive")
    before = {table.title: table for table in old.comparisons}
    after = {table.title: table for table in new.comparisons}
    for title, table in before.items():
        if title in after:
            yield from _table_changes(table, after[title], threshold)
        else:
            yield Change(title, "*", "table", 0, 0, 0, "gone")
    for title in after:
        if title not in before:
            yield Change(title, "*", "table", 0, 0, 0, "new")


def _table_changes(old: Comparison, new: Comparison, threshold: float) -> Iterator[Change]:
    arms = {arm.name: arm for arm in new.arms}
    for arm in old.arms:
        other = arms.pop(arm.name, None)
        if other is None:
            yield Change(old.title, arm.name, "arm", 0, 0, 0, "gone")
        elif arm.status == "ok" and other.status != "ok":
            yield Change(old.title, arm.name, other.status, 0, 0, 0, "broken")
        else:
            yield from _arm_changes(old.title, arm, other, threshold)
    for name in arms:
        yield Change(old.title, name, "arm", 0, 0, 0, "new")


def _arm_changes(title: str, old: ArmReport, new: ArmReport, threshold: float) -> Iterator[Change]:
    shared = [bound for bound in old.ratios if bound in new.ratios]
    if shared:
        figure, a, b = f"x {shared[0]}", old.ratios[shared[0]].cpu, new.ratios[shared[0]].cpu
        yield Change(title, old.name, figure, a.median, b.median, _quotient(a, b), _judge(a, b, threshold))
    elif old.cpu and new.cpu:
        a, b = old.cpu, new.cpu
        yield Change(title, old.name, "CPU s", a.median, b.median, _quotient(a, b), _judge(a, b, threshold))
    if old.allocator_peak and new.allocator_peak:
        held, holds = Spread.of([old.allocator_peak]), Spread.of([new.allocator_peak])
        verdict = _judge(held, holds, threshold)
        yield Change(title, old.name, "allocator bytes", held.median, holds.median, _quotient(held, holds), verdict)


def _quotient(old: Spread, new: Spread) -> float:
    return new.median / old.median if old.median else 0.0


def _judge(old: Spread, new: Spread, threshold: float) -> Verdict:
    if new.median > old.median * (1 + threshold) and new.min > old.max:
        return "worse"
    if new.median < old.median * (1 - threshold) and new.max < old.min:
        return "better"
    return "same"


def table_of(found: list[Change], *, everything: bool = False) -> Table:
    """What changed (or everything) for the terminal."""
    table = Table(title="new over old")
    for column in ("table", "arm", "figure", "old", "new", "ratio", "verdict"):
        table.add_column(column, justify="right" if column in ("old", "new", "ratio") else "left")
    for one in found:
        if everything or one.verdict != "same":
            figures = [f"{value:.4g}" if value else "" for value in (one.old, one.new, one.ratio)]
            table.add_row(one.title, one.arm, one.figure, *figures, one.verdict, style=_STYLES.get(one.verdict))
    return table


def main(
    old: Annotated[Path, typer.Argument(help="JSON of the run to measure against.")],
    new: Annotated[Path, typer.Argument(help="JSON of the run in question.")],
    threshold: Annotated[float, typer.Option(help="Smallest relative change that counts.")] = 0.05,
    everything: Annotated[bool, typer.Option("--all", help="Show figures that did not change, too.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write all changes to this file as JSON.")] = None,
) -> None:
    """Compare two result files of one benchmark program; exit with 1 when anything got worse."""
    found = list(changes(read_record(old), read_record(new), threshold))
    console = Console()
    console.print(table_of(found, everything=everything))
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in ("same", "better", *BAD, "new")}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    if output is not None:
        output.write_bytes(TypeAdapter(list[dict[str, object]]).dump_json([asdict(one) for one in found], indent=1))
    raise typer.Exit(int(any(one.verdict in BAD for one in found)))


if __name__ == "__main__":
    typer.run(main)
