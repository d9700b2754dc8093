"""`tuna bench` lists the programs, hands options on, and refuses what is none."""

from pathlib import Path

import pytest

from tuna.cli import bench, main


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", *words])
    return int(end.value.code or 0)


def test_without_a_program_they_are_listed_each_with_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {"kernels", "step", "sharing", "growth", "diff", "document"} <= {name for name, _ in lines}
    assert all(len(summary) > 20 for _, summary in lines)


def test_options_reach_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sharing", "--help") == 0
    assert "--ratio" in capsys.readouterr().out
    assert run("sharing", "--width", "65") == 2


def test_an_installation_without_the_repository_says_where_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "tuna" / "cli" / "bench.py"))
    assert run() == 2
    assert "clone the repository" in capsys.readouterr().err


def test_an_unknown_program_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("kernals") == 2
    assert "'kernals' is not one of kernels" in capsys.readouterr().err
