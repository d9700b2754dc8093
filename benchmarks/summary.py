"""The first screen of `docs/benchmarks.md`: one line a comparison, Tuna beside the baseline and the fastest peer."""

from __future__ import annotations

from benchmarks.record import ArmReport, Comparison, Record
from benchmarks.report import seconds

RECORDS = ("step.json", "step_limit_512.json", "step_4_groups.json", "attention.json", "kernels.json", "sharing.json")
OURS = ("tuna", "tuna cpu", "tuna tree")
BASELINES = ("baseline", "sdpa padded")
HEADER = ["| comparison | Tuna | baseline | fastest peer |", "| --- | ---: | ---: | ---: |"]


def summary(records: dict[str, Record]) -> list[str]:
    """Lines of Markdown, of the records named in `RECORDS` that are there; none without them."""
    lines = [
        line for name in RECORDS if name in records for table in records[name].comparisons for line in _line(table)
    ]
    if not lines:
        return []
    return [
        "## At a glance",
        "",
        "CPU time and memory (peak of torch's allocator above the inputs) of the fastest round. The baseline is, for "
        "steps, k padded copies with full logits; for attention, SDPA over padded copies; for the head, linear, "
        "log_softmax and gather. A peer is any other arm of the tables below that is not ours.",
        "",
        *HEADER,
        *lines,
        "",
    ]


def _line(table: Comparison) -> list[str]:
    timed = [arm for arm in table.arms if arm.cpu is not None]
    ours = next((arm for arm in timed if arm.name in OURS), None)
    baseline = next((arm for arm in timed if arm.name in BASELINES), None)
    if ours is None or baseline is None:
        return []
    peers = [arm for arm in timed if arm.name not in BASELINES and not arm.name.startswith("tuna")]
    fastest = min(peers, key=lambda arm: arm.cpu.min if arm.cpu else 0.0, default=None)
    title = table.title.split("; oracle:")[0].replace("|", "\\|")
    cells = [title, f"**{_cell(ours)}**", _cell(baseline), f"{_cell(fastest)}, {fastest.name}" if fastest else ""]
    return [f"| {' | '.join(cells)} |"]


def _cell(arm: ArmReport) -> str:
    memory = "" if arm.allocator_peak is None else f", {arm.allocator_peak / 2**20:,.0f} MiB"
    return f"{seconds(arm.cpu.min) if arm.cpu else ''}{memory}"
