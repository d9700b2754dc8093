"""Which configuration is chosen, tuned and remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuna_kernels.gpu import launch
from tuna_kernels.gpu.static_case import Config

A, B, C = Config({"BLOCK_M": 1}), Config({"BLOCK_M": 2}), Config({"BLOCK_M": 4})
TABLE = {80: (A, B), 90: (B, C)}
H100 = launch.Device("H100", 90, 132)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(launch.ENVIRONMENT_VARIABLE, raising=False)
    launch._tuned.cache_clear()
    yield tmp_path / "tuna_kernels" / "autotune.json"
    launch._tuned.cache_clear()


def test_the_newest_architecture_that_is_not_newer() -> None:
    expected = {75: A, 80: A, 89: A, 90: B, 103: B, 120: B}
    assert {c: launch.candidates(TABLE, c)[0] for c in expected} == expected


def test_without_tuning_the_first_runs_and_nothing_is_timed_or_written(cache: Path) -> None:
    calls: list[Config] = []
    assert launch.choose("k", TABLE, H100, ("bf16", 4096), calls.append) is B
    assert not calls and not cache.exists()


def test_tuning_times_all_and_remembers_the_quickest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, "1")
    timed: list[Config] = []
    milliseconds = {2: 3.0, 4: 1.0}

    def clock(run: object) -> float:
        run()  # type: ignore[operator]
        return milliseconds[timed[-1].blocks["BLOCK_M"]]

    monkeypatch.setattr(launch, "_milliseconds", clock)
    assert launch.choose("k", TABLE, H100, ("bf16", 4096), timed.append) is C
    assert timed == [B, C]
    assert launch.choose("k", TABLE, H100, ("bf16", 4096), timed.append) is C and len(timed) == 2
    (key,) = json.loads(cache.read_text())
    assert key.startswith("H100|") and key.endswith("|k|bf16|4096")
    # Another shape, another GPU: tuned anew, and beside the first in the file.
    launch.choose("k", TABLE, H100, ("bf16", 8192), timed.append)
    launch.choose("k", TABLE, launch.Device("A100", 80, 108), ("bf16", 4096), lambda c: timed.append(C))
    assert len(timed) == 6 and len(json.loads(cache.read_text())) == 3
    launch._tuned.cache_clear()  # another process
    assert launch.choose("k", TABLE, H100, ("bf16", 4096), timed.append) is C and len(timed) == 6


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"other": "text"}'])
def test_a_damaged_cache_is_as_none(content: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, "1")
    monkeypatch.setattr(launch, "_milliseconds", lambda run: 1.0)
    cache.parent.mkdir()
    cache.write_text(content)
    assert launch.choose("k", TABLE, H100, ("bf16",), lambda c: None) is B
    assert any("bf16" in key for key in json.loads(cache.read_text()))


def test_an_unwritable_cache_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, "1")
    monkeypatch.setattr(launch, "_milliseconds", lambda run: 1.0)
    (tmp_path / "tuna_kernels").write_text("a file where the directory should be")
    assert launch.choose("k", TABLE, H100, ("bf16",), lambda c: None) is B


def test_buckets_are_powers_of_two() -> None:
    assert [launch.bucket(n) for n in (1, 2, 3, 4096, 4097, 128257)] == [1, 2, 4, 4096, 8192, 131072]
