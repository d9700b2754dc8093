"""A `Record` for people: a table on the terminal, a Markdown table, a picture. And the spinner while it is
made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status
from rich.table import Table

from benchmarks.machine import Machine, describe_machine
from benchmarks.record import ArmReport, Comparison, Record, Sample, Spread, write_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "tuna"  # arms whose name begins so are drawn in colour
_COLOURS = {True: "#c2410c", False: "#94a3b8"}
_LINE = "#0f766e"
_MIB = 2**20
_TIMES = ("CPU min", "CPU median", "spread", "wall min", "wall median")


class Progress:
    """A line that says what is happening; on a terminal it spins, elsewhere it stays silent."""

    def __init__(self) -> None:
        self._status: Status = Console(stderr=True).status("starting")

    def __enter__(self) -> Progress:
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def __call__(self, line: str) -> None:
        self._status.update(line)


class Report:
    """Collects the comparisons of a run: shows each when it is finished and keeps `NAME.json` up to date.

    `finish` adds `NAME.md` and the pictures: a comparison whose setting names a `figure` is drawn in
    `NAME-FIGURE.png`, the others in `NAME.png`.
    """

    def __init__(
        self, program: str, folder: Path, name: str, packages: tuple[str, ...], options: dict[str, str]
    ) -> None:
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self.record = Record(program, created, describe_machine(packages), [], options)
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = 140  # a log file does not mind, and cut cells say nothing

    def add(self, comparison: Comparison) -> None:
        """Take in a finished comparison."""
        self.record.comparisons.append(comparison)
        self.console.print(rich_table(comparison))
        write_record(self.record, self.folder / f"{self.name}.json")

    def finish(self, *, pictures: bool = True) -> None:
        """Write the tables and (unless the program draws its own) the pictures."""
        (self.folder / f"{self.name}.md").write_text(markdown(self.record), encoding="utf-8")
        figures: dict[str, list[Comparison]] = {}
        for comparison in self.record.comparisons:
            if pictures and any(arm.samples for arm in comparison.arms):
                figures.setdefault(str(comparison.setting.get("figure", "")), []).append(comparison)
        machine = describe(self.record.machine)
        for figure, comparisons in figures.items():
            draw(comparisons, self.folder / ("-".join(filter(None, [self.name, figure])) + ".png"), title=machine)
        self.console.print(f"{machine}\nwritten: {self.folder / self.name}.json, .md and pictures", highlight=False)


def describe(machine: Machine) -> str:
    """One line: processor, threads, versions, what the environment chose."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    chosen = "".join(f", {name}={value}" for name, value in machine.environment.items())
    return (
        f"{machine.processor} ({machine.cpu_capability}), {machine.threads} of {machine.cores} threads, "
        f"{versions}{chosen}, load {machine.load}" + (f", commit {machine.commit}" if machine.commit else "")
    )


def rich_table(comparison: Comparison) -> Table:
    """The comparison as a table for the terminal: the Markdown table without medians, wall times and notes."""
    header, rows = table_cells(comparison)
    dropped = {"CPU median", "wall min", "wall median", "remark"}
    if any(arm.samples for arm in comparison.arms):
        dropped |= {name for name in header if name.startswith("norm")}
    kept = [place for place, column in enumerate(header) if column not in dropped]
    table = Table(title=comparison.title, title_justify="left", caption_justify="left")
    for place in kept:
        table.add_column(header[place], justify="right" if place else "left", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(row[place] for place in kept), style="bold" if row[0].startswith(OURS) else None)
    remarks = [f"{arm.name} {arm.status}: {arm.reason}" for arm in comparison.arms if arm.reason]
    table.caption = "\n".join([_caption(comparison), *remarks])
    return table


def markdown(record: Record) -> str:
    """All comparisons as Markdown tables."""
    lines = [f"# {record.program}, {record.created}", "", describe(record.machine), ""]
    if record.options:
        lines += ["Options: " + ", ".join(f"{key} {value}" for key, value in record.options.items()), ""]
    for comparison in record.comparisons:
        lines += [f"## {comparison.title}", "", _caption(comparison), "", *markdown_table(comparison), ""]
    return "\n".join(lines)


def markdown_table(comparison: Comparison) -> list[str]:
    """One comparison as the lines of a Markdown table."""
    header, rows = table_cells(comparison)
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join(" --- " if c in ("arm", "remark") else " ---: " for c in header) + "|")
    return lines + ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]


def table_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows, without columns that are empty; an arm that was not timed keeps its row and says why."""
    bounds, kinds = [bound.name for bound in comparison.bounds], list(comparison.tolerance)
    rows = [_unit_cells(name, samples) for name, samples in comparison.units.items()]
    rows += [_arm_cells(arm, bounds, kinds) for arm in comparison.arms]
    order = ["arm", *_TIMES, *(f"x {name}" for name in bounds), "allocator", "x bound", "growth", "process"]
    order += [f"{word} {kind}" for kind in kinds for word in ("error", "norm")] + ["remark"]
    header = [column for column in order if any(row.get(column) for row in rows)]
    return header, [[row.get(column, "") for column in header] for row in rows]


def _unit_cells(name: str, samples: list[Sample]) -> dict[str, str]:
    cpu, wall = Spread.of([s.cpu for s in samples]), Spread.of([s.wall for s in samples])
    return {"arm": name, **_times(cpu, wall), "remark": "bare, part of every round"}


def _arm_cells(arm: ArmReport, bounds: Sequence[str], kinds: Sequence[str]) -> dict[str, str]:
    cells = {"arm": arm.name}
    if arm.cpu and arm.wall:
        cells |= _times(arm.cpu, arm.wall)
    cells |= {f"x {name}": f"{arm.ratios[name].cpu.median:.2f}" for name in bounds if name in arm.ratios}
    first = arm.ratios.get(bounds[0]) if bounds else None
    if first and first.memory is not None:
        cells["x bound"] = f"{first.memory:.2f}"
    cells |= {"allocator": _bytes(arm.allocator_peak), "growth": _bytes(arm.resident_growth)}
    cells["process"] = _bytes(arm.process_peak)
    for kind in kinds:
        if kind in arm.errors:
            error = arm.errors[kind]
            cells |= {f"error {kind}": _figure(error.max_rel), f"norm {kind}": _figure(error.norm_rel)}
    remarks = [arm.note, arm.reason and f"{arm.status}: {arm.reason}", arm.version]
    return cells | {"remark": "; ".join(filter(None, remarks))}


def _times(cpu: Spread, wall: Spread) -> dict[str, str]:
    values = [seconds(cpu.min), seconds(cpu.median), f"{cpu.relative:.0%}", seconds(wall.min), seconds(wall.median)]
    return dict(zip(_TIMES, values, strict=True))


def seconds(value: float) -> str:
    """Three digits: "1.23 s", "412 ms", "3.1 ms"."""
    if value >= 1:
        return f"{value:.2f} s" if value < 100 else f"{value:.0f} s"
    milliseconds = value * 1000
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2g} ms"


def _bytes(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / _MIB:.0f} MiB" if value >= 10 * _MIB else f"{value / _MIB:.2f} MiB"


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _caption(comparison: Comparison) -> str:
    allowed = ", ".join(f"{kind} {limit:.1e}" for kind, limit in comparison.tolerance.items())
    errors = f"error: max|a - o| / max|o| against the oracle, allowed {allowed}; norm: ||a - o|| / ||o||."
    if not any(arm.samples for arm in comparison.arms):
        return errors
    return (
        "CPU: process time of all threads. x: median over rounds of CPU time over the bound's of the round. "
        "allocator, growth: memory above the inputs, by torch and of a fresh process; process: that process in all. "
        + errors
    )


def draw(comparisons: Sequence[Comparison], path: Path, *, title: str = "") -> None:
    """One row of panels per comparison: CPU time with the bounds as lines, and memory by both meters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [1.6 + 0.34 * len(comparison.arms) for comparison in comparisons]
    figure, axes = plt.subplots(
        len(comparisons),
        2,
        figsize=(13, max(sum(heights), 3)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for comparison, (left, right) in zip(comparisons, axes, strict=True):
        left.set_title(comparison.title, fontsize=9, loc="left")
        _draw_times(comparison, left)
        _draw_memory(comparison, right)
        handles, labels = left.get_legend_handles_labels()
        if handles:  # above the right panel: within the left one it would cover bars
            place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2}
            right.legend(handles, labels, fontsize=8, frameon=False, **place)
    figure.suptitle(title, fontsize=8, color="#64748b")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_times(comparison: Comparison, ax: Axes) -> None:
    _prepare(ax, comparison, "process CPU seconds: bar = smallest, whisker = largest")
    for place, arm in enumerate(comparison.arms):
        if arm.cpu is None:
            ax.text(0, place, f"  {arm.status}", va="center", fontsize=8, color="#64748b")
            continue
        ax.barh(place, arm.cpu.min, color=_COLOURS[arm.name.startswith(OURS)], height=0.65)
        ax.plot([arm.cpu.min, arm.cpu.max], [place, place], color="#1e293b", linewidth=1)
        first = next(iter(arm.ratios.values()), None)
        label = seconds(arm.cpu.min) + (f"  {first.cpu.median:.2f}x" if first else "")
        ax.annotate(label, (arm.cpu.max, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    for style, bound in zip(("-", ":"), comparison.bounds, strict=False):
        if all(name in comparison.units for name in bound.units):
            at = sum(n * min(s.cpu for s in comparison.units[name]) for name, n in bound.units.items())
            ax.axvline(at, color=_LINE, linestyle=style, linewidth=1.2, label=f"bare {bound.name}")
    ax.set_xlim(0, ax.get_xlim()[1] * 1.15)


def _draw_memory(comparison: Comparison, ax: Axes) -> None:
    _prepare(ax, comparison, "MiB above the inputs: bar = allocator, outline = growth of the process")
    for place, arm in enumerate(comparison.arms):
        if arm.allocator_peak is None:
            continue
        size = arm.allocator_peak / _MIB
        ax.barh(place, size, color=_COLOURS[arm.name.startswith(OURS)], height=0.65)
        if arm.resident_growth is not None:
            ax.barh(place, arm.resident_growth / _MIB, fill=False, edgecolor="#1e293b", height=0.65)
        label = _bytes(arm.allocator_peak)
        ax.annotate(
            label,
            (max(size, (arm.resident_growth or 0) / _MIB), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    for bound in comparison.bounds[:1]:
        if bound.bytes is not None:
            ax.axvline(bound.bytes / _MIB, color=_LINE, linewidth=1.2)
    ax.set_xlim(0, max(ax.get_xlim()[1] * 1.15, 1e-6))


def _prepare(ax: Axes, comparison: Comparison, xlabel: str) -> None:
    ax.set_yticks(range(len(comparison.arms)), [arm.name for arm in comparison.arms], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(xlabel, fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(y=0.03)
