"""Two records side by side: what moved beyond the noise is flagged, what did not is not."""

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import diff
from benchmarks.machine import Machine
from benchmarks.record import ArmReport, Bound, Comparison, Ratio, Record, Sample, Spread, Status, write_record

MACHINE = Machine("a processor", 2, 2**30, 2, "Linux", "AVX2", "MKL", "3.11")


def arm(name: str, ratios: list[float], peak: int = 100, status: Status = "ok") -> ArmReport:
    spread = Spread.of(ratios)
    samples = [Sample(i, 0, x, x) for i, x in enumerate(ratios)]
    return ArmReport(name, status, samples=samples, ratios={"1 mm": Ratio(spread, spread, None)}, allocator_peak=peak)


def record(*arms: ArmReport, title: str = "table", program: str = "benchmarks.kernels") -> Record:
    bounds = [Bound("1 mm", {"mm": 1})]
    return Record(program, "2026-01-01", MACHINE, [Comparison(title, {}, {}, bounds, {}, list(arms))])


def verdicts(old: Record, new: Record, threshold: float = 0.05) -> dict[tuple[str, str], str]:
    return {(one.arm, one.figure): one.verdict for one in diff.changes(old, new, threshold)}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([1.0, 1.02, 1.04], [1.20, 1.22, 1.24], "worse"),
        ([1.20, 1.22, 1.24], [1.0, 1.02, 1.04], "better"),
        ([1.0, 1.02, 1.30], [1.20, 1.22, 1.24], "same"),  # the spreads overlap
        ([1.0, 1.001, 1.002], [1.01, 1.011, 1.012], "same"),  # beyond the spread, but below the threshold
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "same"),
    ],
)
def test_a_time_counts_beyond_threshold_and_spread(before: list[float], after: list[float], verdict: str) -> None:
    assert verdicts(record(arm("ours", before)), record(arm("ours", after)))["ours", "x 1 mm"] == verdict


@pytest.mark.parametrize(("peak", "verdict"), [(104, "same"), (106, "worse"), (94, "better")])
def test_memory_counts_beyond_the_threshold(peak: int, verdict: str) -> None:
    found = verdicts(record(arm("ours", [1.0])), record(arm("ours", [1.0], peak)))
    assert found["ours", "allocator bytes"] == verdict


def test_arms_and_tables_that_come_and_go_are_named() -> None:
    old, new = record(arm("a", [1.0]), arm("b", [1.0])), record(arm("b", [1.0], status="wrong"), arm("c", [1.0]))
    found = {(one.arm, one.verdict) for one in diff.changes(old, new)}
    assert found == {("a", "gone"), ("b", "broken"), ("c", "new")}
    tables = {(one.title, one.verdict) for one in diff.changes(record(title="x"), record(title="y"))}
    assert tables == {("x", "gone"), ("y", "new")}


def test_without_a_bound_cpu_seconds_are_compared() -> None:
    plain = replace(arm("ours", [1.0, 1.1]), ratios={})
    slower = replace(arm("ours", [2.0, 2.1]), ratios={})
    assert verdicts(record(plain), record(slower))["ours", "CPU s"] == "worse"


def test_records_of_two_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="different programs"):
        list(diff.changes(record(), record(program="benchmarks.step")))


def test_the_program_exits_with_1_on_a_regression_only(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(diff.main)
    for name, ratio in (("old", 1.0), ("slow", 2.0)):
        write_record(record(arm("ours", [ratio])), tmp_path / f"{name}.json")
    run = CliRunner().invoke
    assert run(app, [str(tmp_path / "old.json"), str(tmp_path / "old.json")]).exit_code == 0
    worse = run(app, [str(tmp_path / "old.json"), str(tmp_path / "slow.json"), "--output", str(tmp_path / "d.json")])
    assert worse.exit_code == 1 and "worse" in worse.output
    assert '"ratio": 2.0' in (tmp_path / "d.json").read_text()
