"""The profile of a step: every part of every way gets time, and the parts are those of the step."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.profile import PARTS, main


def test_every_way_spends_time_in_every_part(tmp_path: Path) -> None:
    main(model="tiny", groups=[1], rounds=1, threads=1, output=tmp_path)
    record = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert [row["way"] for row in record["rows"]] == ["tuna", "baseline", "plain tree"]
    for row in record["rows"]:
        assert tuple(row["parts"]) == PARTS
        assert all(milliseconds > 0 for milliseconds in row["parts"].values()), row
        assert row["packing"] > 0
    assert "| 1 | plain tree |" in (tmp_path / "profile.md").read_text(encoding="utf-8")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
