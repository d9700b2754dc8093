"""A short run of every fuzzer; and their runner outlives whatever a case does."""

from __future__ import annotations

import pytest

from tests.fuzz import runner


@pytest.mark.parametrize("name", list(runner.fuzzers()))
def test_short_run(name: str) -> None:
    for seed in range(runner.short_run(name)):
        fault = runner.outcome(name, seed)
        assert not fault, f"python -m tests.fuzz --only {name} --seed {seed} --cases 1\n{fault}"


def test_a_case_that_fails_crashes_or_hangs_is_reported_and_the_rest_run() -> None:
    faults: dict[int, str] = {}
    (tally,) = runner.run(
        ["_faulty"],
        seed=1,
        seconds=200,
        cases=7,
        report=lambda name, seed, fault: faults.update({seed: fault}),
        case_seconds=5,
    )
    assert tally.cases == 7 and tally.failed_seeds == [3, 4, 5, 6]
    assert faults[3] == "a broken law" and "KeyError" in faults[4]
    assert "SIGKILL" in faults[5] and faults[6] == "no end after 5 s"


def test_seeds_count_on_from_the_one_given_and_time_ends_a_run() -> None:
    tallies = runner.run(["_faulty"], seed=100, seconds=0, report=lambda *_: None)
    assert [t.cases for t in tallies] == [0]
