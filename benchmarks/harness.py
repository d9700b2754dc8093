"""The one benchmark harness: check every arm against the oracle, then time the right ones in interleaved
rounds.

An *arm* is a named callable over inputs that all arms share. `compare`

1. asks each arm whether it serves these inputs (a refusal is listed with its reason);
2. runs it once and holds its results against the float64 oracle within a stated tolerance; an arm that misses
   it is reported as wrong and never timed;
3. runs it once under the allocator meter, and once in a fresh process where the caller knows how to start
   one;
4. times rounds A B C …, B C … A, …: the order rotates, so that no arm always follows the same neighbour.
   Process CPU time and wall time are both kept, since on a shared machine the wall clock measures the
   neighbours too. The *units* (bare matrix multiplies) are part of every round, and ratios are taken within a
   round before anything is summarised.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from benchmarks.machine import version_of
from benchmarks.record import ArmReport, Bound, Comparison, Ratio, Sample, Setting, Spread, Status
from tuna.compare.agreement import Error, Results, measure_errors
from tuna.compare.memory_meter import ResidentPeak, allocator_peak

Inputs = TypeVar("Inputs")
Clock = Callable[[], tuple[float, float]]


def process_clock() -> tuple[float, float]:
    """CPU seconds of all threads of this process, and wall seconds."""
    return time.process_time(), time.perf_counter()


def serves(_: object) -> str:
    """The `Arm.refuses` of an arm that serves any inputs."""
    return ""


@dataclass(frozen=True)
class Arm(Generic[Inputs]):
    """A named way to compute something.

    `call` does the work that is timed. `results` turns what it returned into named tensors, outside the
    clock; a name `kind:detail` belongs to the kind before the colon. `refuses` gives the reason why the
    arm cannot serve some inputs, or "". `package` is the distribution whose version goes on record.
    """

    name: str
    call: Callable[[Inputs], Any]
    note: str = ""
    package: str = ""
    refuses: Callable[[Inputs], str] = serves
    results: Callable[[Any], Results] = dict


@dataclass(frozen=True)
class Rounds:
    """How long to measure: `rounds` rounds, of which an arm skips the later ones once it has taken part in
    `least` rounds and used more than `budget` wall seconds (slow arms would otherwise take most of the
    time). `once`: an arm is called one time for everything, its check, its memory and its time, for calls of many
    minutes."""

    rounds: int = 5
    budget: float = 60.0
    least: int = 3
    clock: Clock = process_clock
    once: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.least < 1:
            raise ValueError(f"rounds = {self.rounds} and least = {self.least} must be at least 1")


def compare(
    title: str,
    arms: Sequence[Arm[Inputs]],
    inputs: Inputs,
    *,
    oracle: Results,
    tolerance: Mapping[str, float],
    units: Mapping[str, Callable[[], object]] | None = None,
    bounds: Sequence[Bound] = (),
    plan: Rounds | None = None,
    resident: Callable[[str], ResidentPeak] | None = None,
    meter: Callable[[Callable[[], object]], int] = allocator_peak,
    setting: Setting | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Check, measure and time `arms` over `inputs`.

    Args:
        oracle: the right results in float64, by name.
        tolerance: for each kind of result the largest `Error.max_rel` that passes.
        units: named work without results, timed in every round beside the arms.
        bounds: yardsticks made of units or arms.
        resident: runs the arm of that name in a fresh process and tells its memory.
        meter: peak memory of a call, above what was there before.
        setting: what the inputs are, for the record.
        progress: told what happens next, one line at a time.

    Raises:
        ValueError: two arms or units of one name, or a kind of result without tolerance.
    """
    plan, units = plan or Rounds(), dict(units or {})
    _refuse_doubles([arm.name for arm in arms] + list(units))
    reports, samples = {}, {}
    for arm in arms:
        progress(f"{title}: checking {arm.name}")
        if plan.once:
            reports[arm.name], samples[arm.name] = _once(arm, inputs, oracle, tolerance, meter, plan.clock)
            continue
        report = check_arm(arm, inputs, oracle, tolerance)
        if report.status == "ok":
            report = _with_memory(report, arm, inputs, resident, meter)
        reports[arm.name] = report
    timed = {name: unit for name, unit in units.items() if _warm(unit)}
    if not plan.once:
        timed |= {arm.name: _bind(arm, inputs) for arm in arms if reports[arm.name].status == "ok"}
    samples |= run_rounds(timed, plan, lambda line: progress(f"{title}: {line}"))
    finished = [
        replace(report, samples=samples.get(name, []), ratios=_ratios(report, samples, bounds, reports))
        for name, report in reports.items()
    ]
    unit_samples = {name: samples[name] for name in units}
    return Comparison(title, setting or {}, dict(tolerance), list(bounds), unit_samples, finished)


def check_arm(arm: Arm[Inputs], inputs: Inputs, oracle: Results, tolerance: Mapping[str, float]) -> ArmReport:
    """Run `arm` once and hold it against `oracle`. No exception of the arm gets out: it becomes the
    reason."""

    def report(status: Status, reason: str, errors: dict[str, Error] | None = None) -> ArmReport:
        version = f"{arm.package} {version_of(arm.package)}" if arm.package else ""
        return ArmReport(arm.name, status, reason, arm.note, version, errors or {})

    refusal = arm.refuses(inputs)
    if refusal:
        return report("unsupported", refusal)
    try:
        results = arm.results(arm.call(inputs))
    except Exception as error:  # a peer may raise anything; the others must still be measured
        return report("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    if set(results) != set(oracle):
        return report("wrong", f"results {sorted(results)} instead of {sorted(oracle)}")
    misshapen = [name for name in oracle if results[name].shape != oracle[name].shape]
    if misshapen:
        name = misshapen[0]
        return report("wrong", f"{name} has shape {[*results[name].shape]}, not {[*oracle[name].shape]}")
    errors = measure_errors(results, oracle)
    faults = [fault for kind in errors if (fault := _fault(kind, errors[kind], tolerance))]
    return report("wrong" if faults else "ok", "; ".join(faults), errors)


def run_rounds(
    timed: Mapping[str, Callable[[], object]], plan: Rounds, progress: Callable[[str], None] = lambda _: None
) -> dict[str, list[Sample]]:
    """Time every callable once a round, the order rotated by one place from round to round."""
    samples: dict[str, list[Sample]] = {name: [] for name in timed}
    names = list(timed)
    gc.collect()
    gc.freeze()  # so that the collection before each timed call looks at what the calls left behind, not at everything
    try:
        for number in range(plan.rounds):
            shift = number % max(len(names), 1)
            for position, name in enumerate(names[shift:] + names[:shift]):
                spent = sum(sample.wall for sample in samples[name])
                if len(samples[name]) >= plan.least and spent > plan.budget:
                    continue
                progress(f"round {number + 1}/{plan.rounds} {name}")
                cpu, wall = _time_once(timed[name], plan.clock)
                samples[name].append(Sample(number, position, cpu, wall))
    finally:
        gc.unfreeze()
    return samples


def _time_once(call: Callable[[], object], clock: Clock) -> tuple[float, float]:
    gc.collect()
    gc.disable()  # a collection inside the clock would charge an arm for its neighbours' garbage
    try:
        before = clock()
        kept = call()
        after = clock()
    finally:
        gc.enable()
    del kept
    return after[0] - before[0], after[1] - before[1]


def _ratios(
    report: ArmReport,
    samples: Mapping[str, list[Sample]],
    bounds: Sequence[Bound],
    reports: Mapping[str, ArmReport],
) -> dict[str, Ratio]:
    ratios = {}
    mine = {sample.round: sample for sample in samples.get(report.name, [])}
    for bound in bounds:
        if any(name not in samples for name in bound.units):
            continue  # a bound made of an arm that was wrong, or refused
        parts = {name: {sample.round: sample for sample in samples[name]} for name in bound.units}
        shared = [number for number in mine if all(number in part for part in parts.values())]
        if not shared:
            continue
        cpu, wall = [], []
        for number in shared:
            cpu.append(mine[number].cpu / sum(n * parts[name][number].cpu for name, n in bound.units.items()))
            wall.append(mine[number].wall / sum(n * parts[name][number].wall for name, n in bound.units.items()))
        ratios[bound.name] = Ratio(Spread.of(cpu), Spread.of(wall), _memory_ratio(report, bound, reports))
    return ratios


def _memory_ratio(report: ArmReport, bound: Bound, reports: Mapping[str, ArmReport]) -> float | None:
    size = bound.bytes
    if size is None:
        size = sum(reports[name].allocator_peak or 0 for name in bound.units if name in reports)
    return report.allocator_peak / size if report.allocator_peak is not None and size else None


def _with_memory(
    report: ArmReport,
    arm: Arm[Inputs],
    inputs: Inputs,
    resident: Callable[[str], ResidentPeak] | None,
    meter: Callable[[Callable[[], object]], int],
) -> ArmReport:
    report = replace(report, allocator_peak=meter(_bind(arm, inputs)))
    if resident is None:
        return report
    try:
        peak = resident(arm.name)
        return replace(report, resident_growth=peak.growth, process_peak=peak.process)
    except RuntimeError as error:  # the fresh process died (of memory, say): the arm can still be timed
        return replace(report, reason=str(error))


def _once(
    arm: Arm[Inputs],
    inputs: Inputs,
    oracle: Results,
    tolerance: Mapping[str, float],
    meter: Callable[[Callable[[], object]], int],
    clock: Clock,
) -> tuple[ArmReport, list[Sample]]:
    """Check, memory and time of a single call."""
    samples: list[Sample] = []
    peaks: list[int] = []

    def call(inputs: Inputs) -> Any:
        kept: list[Any] = []

        def work() -> None:
            cpu, wall = _time_once(lambda: kept.append(arm.call(inputs)), clock)
            samples.append(Sample(0, 0, cpu, wall))

        peaks.append(meter(work))
        return kept[0]

    report = check_arm(replace(arm, call=call), inputs, oracle, tolerance)
    if report.status != "ok":
        return report, []
    return replace(report, allocator_peak=peaks[0]), samples


def _bind(arm: Arm[Inputs], inputs: Inputs) -> Callable[[], Any]:
    return lambda: arm.call(inputs)


def _warm(unit: Callable[[], object]) -> bool:
    unit()
    return True


def _fault(kind: str, error: Error, tolerance: Mapping[str, float]) -> str:
    if kind not in tolerance:
        raise ValueError(f"tolerance has no entry for results of kind {kind!r}; it has {sorted(tolerance)}")
    if error.max_rel is None:
        return f"{error.worst} is not finite"
    if error.max_rel > tolerance[kind]:
        return f"{error.worst} is off by {error.max_rel:.1e}, more than {tolerance[kind]:.1e}"
    return ""


def _refuse_doubles(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} names two arms or units")
