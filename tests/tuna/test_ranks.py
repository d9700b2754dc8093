"""Law: a rank that did its work ends with code 0, whatever its worker threads still hold."""

from __future__ import annotations

from pathlib import Path

from tests.tuna.launching import run


def test_a_rank_ends_whole_though_its_threads_wait_for_python(tmp_path: Path) -> None:
    run(2, "tests.tuna.ending_rank", (), tmp_path, timeout=200)
