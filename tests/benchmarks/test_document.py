"""docs/benchmarks.md is what the committed records say."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.document import PAGE, RESULTS, main, page, read_results

APP = typer.Typer()
APP.command()(main)


def test_the_committed_page_is_that_of_the_committed_records() -> None:
    if not RESULTS.is_dir():
        pytest.skip("installed without the repository's results")
    records = read_results(RESULTS)
    assert records
    assert PAGE.read_text(encoding="utf-8") == page(records, sorted(path.name for path in RESULTS.glob("*.png")))


def test_every_table_of_every_record_is_on_the_page() -> None:
    records = read_results(RESULTS)
    text = page(records, [])
    for record in records.values():
        for comparison in record.comparisons:
            assert f"### {comparison.title}\n" in text
            for arm in comparison.arms:
                assert f"| {arm.name} |" in text


def test_check_says_when_the_page_is_out_of_date(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    assert CliRunner().invoke(APP, ["--output", str(target), "--check"]).exit_code == 1
    assert CliRunner().invoke(APP, ["--output", str(target)]).exit_code == 0
    assert CliRunner().invoke(APP, ["--output", str(target), "--check"]).exit_code == 0
    target.write_text(target.read_text() + "typed by hand")
    assert CliRunner().invoke(APP, ["--output", str(target), "--check"]).exit_code == 1
