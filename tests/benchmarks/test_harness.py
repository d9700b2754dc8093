"""Laws of the harness: wrong arms are caught and never timed, rounds interleave, ratios are those of the round."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness import Arm, Rounds, compare, run_rounds
from benchmarks.record import Bound, Comparison

ORACLE = {"value": torch.tensor([1.0, -2.0], dtype=torch.float64)}
TOLERANCE = {"value": 1e-6}


@dataclass
class Counted:
    """An arm's callable that returns ``result`` and remembers how often it was asked."""

    result: torch.Tensor
    calls: int = 0

    def __call__(self, _: object) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"value": self.result}


@dataclass
class HandClock:
    """A clock that stands still until work moves it on: times are then exact."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def __call__(self) -> tuple[float, float]:
        return self.now, 2 * self.now

    def work(self, name: str, durations: list[float]) -> Callable[[], None]:
        """Work that takes ``durations[i]`` the i-th time it is called."""
        left = iter(durations)

        def call() -> None:
            self.log.append(name)
            self.now += next(left)

        return call


def run(arms: list[Arm[None]], rounds: int = 2) -> Comparison:
    return compare("t", arms, None, oracle=ORACLE, tolerance=TOLERANCE, plan=Rounds(rounds=rounds))


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (torch.tensor([1.0, -2.1]), "off by 5.0e-02"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([float("-inf"), -2.0]), "not finite"),
        (torch.tensor([1.0]), "shape"),
    ],
)
def test_a_wrong_arm_is_caught_and_never_timed(result: torch.Tensor, reason: str) -> None:
    right, wrong = Counted(ORACLE["value"].float()), Counted(result)
    table = run([Arm("right", right), Arm("wrong", wrong)])
    assert table.arm("wrong").status == "wrong"
    assert reason in table.arm("wrong").reason
    assert wrong.calls == 1, "the check runs it once; nothing else may"
    assert table.arm("wrong").samples == [] and table.arm("wrong").cpu is None
    assert table.arm("right").status == "ok" and len(table.arm("right").samples) == 2


def test_an_arm_that_raises_or_lacks_a_result_is_reported_and_the_others_go_on() -> None:
    def broken(_: object) -> None:
        raise ArithmeticError("no luck\nsecond line")

    silent: Arm[None] = Arm("silent", lambda _: {})
    table = run([Arm("broken", broken), silent, Arm("right", Counted(ORACLE["value"]))])
    assert (table.arm("broken").status, table.arm("broken").reason) == ("failed", "ArithmeticError: no luck")
    assert table.arm("silent").status == "wrong"
    assert table.arm("right").status == "ok"


def test_an_arm_that_refuses_is_listed_with_its_reason_and_not_called() -> None:
    counted = Counted(ORACLE["value"])
    table = run([Arm("refusing", counted, refuses=lambda _: "needs a GPU")])
    assert (table.arm("refusing").status, table.arm("refusing").reason) == ("unsupported", "needs a GPU")
    assert counted.calls == 0


@settings(max_examples=15, deadline=None)  # each timed call collects garbage first
@given(st.integers(1, 5), st.integers(1, 7))
def test_rounds_interleave_and_the_order_rotates(arms: int, rounds: int) -> None:
    clock = HandClock()
    names = [f"arm {i}" for i in range(arms)]
    timed = {name: clock.work(name, [1.0] * rounds) for name in names}
    samples = run_rounds(timed, Rounds(rounds=rounds, clock=clock))
    for number in range(rounds):
        played = clock.log[number * arms : (number + 1) * arms]
        assert played == [names[(number + i) % arms] for i in range(arms)]
    for name in names:
        assert [sample.round for sample in samples[name]] == list(range(rounds))


def test_a_slow_arm_keeps_the_least_rounds_and_skips_the_rest() -> None:
    clock = HandClock()
    timed = {"slow": clock.work("slow", [100.0] * 6), "fast": clock.work("fast", [1.0] * 6)}
    samples = run_rounds(timed, Rounds(rounds=6, budget=10, least=2, clock=clock))
    assert [len(samples[name]) for name in ("slow", "fast")] == [2, 6]


@settings(max_examples=10, deadline=None)  # each example starts the memory meter
@given(st.lists(st.tuples(*[st.integers(1, 1000)] * 3), min_size=1, max_size=5))
def test_ratios_are_taken_within_the_round(rounds: list[tuple[int, int, int]]) -> None:
    """Median over rounds of arm / (2 a + b), not a ratio of medians; CPU and wall alike."""
    clock = HandClock()
    moved = {name: [0.0] + [float(one[i]) for one in rounds] for i, name in enumerate(("arm", "a", "b"))}
    work = clock.work("arm", [0.0, *moved["arm"]])  # once more for the memory meter

    def arm(_: None) -> dict[str, torch.Tensor]:
        work()
        return ORACLE

    table = compare(
        "t",
        [Arm("arm", arm)],
        None,
        oracle=ORACLE,
        tolerance=TOLERANCE,
        units={name: clock.work(name, moved[name]) for name in ("a", "b")},
        bounds=[Bound("2a + b", {"a": 2, "b": 1}, 1000)],
        plan=Rounds(rounds=len(rounds), budget=math.inf, clock=clock),
    )
    expected = [arm_time / (2 * a + b) for arm_time, a, b in rounds]
    ratio = table.arm("arm").ratios["2a + b"]
    assert ratio.cpu.median == pytest.approx(median(expected))
    assert (ratio.cpu.min, ratio.cpu.max) == pytest.approx((min(expected), max(expected)))
    assert ratio.wall.median == pytest.approx(median(expected))


def test_memory_ratio_is_that_of_the_allocator_peak() -> None:
    def arm(_: None) -> dict[str, torch.Tensor]:
        return {"value": torch.cat([ORACLE["value"], torch.zeros(2**16, dtype=torch.float64)])[:2]}

    bound = Bound("bound", {"unit": 1}, 2**18)
    table = compare(
        "t",
        [Arm("arm", arm)],
        None,
        oracle=ORACLE,
        tolerance=TOLERANCE,
        units={"unit": lambda: sum(range(1000))},
        bounds=[bound],
        plan=Rounds(rounds=1),
    )
    peak = table.arm("arm").allocator_peak
    assert peak is not None and peak >= 2 * 8 * 2**16
    assert table.arm("arm").ratios["bound"].memory == peak / 2**18


def test_once_checks_times_and_meters_in_one_call() -> None:
    calls: list[str] = []

    def arm(name: str, result: torch.Tensor) -> Arm[None]:
        def call(_: None) -> dict[str, torch.Tensor]:
            calls.append(name)
            return {"value": torch.cat([result, torch.zeros(2**16, dtype=torch.float64)])[:2]}

        return Arm(name, call)

    arms = [arm("good", ORACLE["value"]), arm("bad", ORACLE["value"] + 1)]
    bounds = [Bound("unit", {"unit": 1})]
    units = {"unit": lambda: sum(range(1000))}
    table = compare(
        "t",
        arms,
        None,
        oracle=ORACLE,
        tolerance=TOLERANCE,
        units=units,
        bounds=bounds,
        plan=Rounds(rounds=1, once=True),
    )
    assert calls == ["good", "bad"]
    good, bad = table.arm("good"), table.arm("bad")
    assert len(good.samples) == 1 and (good.allocator_peak or 0) >= 2 * 8 * 2**16
    assert good.ratios["unit"].cpu.median > 0
    assert bad.status == "wrong" and not bad.samples


def test_a_bound_may_be_another_arm_and_vanishes_when_that_arm_is_wrong() -> None:
    good, bad = Arm("good", Counted(ORACLE["value"])), Arm("bad", Counted(ORACLE["value"] + 1))
    bounds = [Bound("good", {"good": 1}), Bound("bad", {"bad": 1})]
    table = compare("t", [good, bad], None, oracle=ORACLE, tolerance=TOLERANCE, bounds=bounds)
    assert set(table.arm("good").ratios) == {"good"}
    assert table.arm("good").ratios["good"].cpu.median == 1.0


def test_mistakes_of_the_caller_are_errors() -> None:
    twice = Arm("same", Counted(ORACLE["value"]))
    with pytest.raises(ValueError, match="'same' names two"):
        run([twice, twice])
    with pytest.raises(ValueError, match="no entry for results of kind 'value'"):
        compare("t", [twice], None, oracle=ORACLE, tolerance={"other": 1.0})
    with pytest.raises(ValueError, match="rounds = 0"):
        Rounds(rounds=0)
