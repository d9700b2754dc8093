"""The endpoint benchmark runs from end to end: every request is answered, every figure is there and finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.endpoint import ARMS, CONCURRENCY, main


def test_it_measures_all_arms(tmp_path: Path) -> None:
    main(output=tmp_path, delay=0.001, requests=64, rounds=1)
    found = json.loads((tmp_path / "endpoint.json").read_text())
    assert [row["concurrency"] for row in found["rows"]] == list(CONCURRENCY)
    assert all(math.isfinite(value) for row in found["rows"] for value in row.values())
    assert {sample["arm"] for sample in found["samples"]} == {*ARMS, "journal"}
    assert all(row["client CPU ms"] > 0 and row["tuna CPU ms"] > 0 for row in found["rows"])
    assert (tmp_path / "endpoint.md").read_text().count("\n| ") == 2 + len(CONCURRENCY)
    assert (tmp_path / "endpoint.png").read_bytes().startswith(b"\x89PNG")
