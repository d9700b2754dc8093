"""What a benchmark run leaves behind: plain dataclasses with a versioned JSON form.

Times are seconds, memory is bytes. Every derived figure stands beside the samples it was derived from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import TypeAdapter

from benchmarks.machine import Machine
from tuna.compare.agreement import Error

SCHEMA: Literal["tuna-benchmark/1"] = "tuna-benchmark/1"
Status = Literal["ok", "wrong", "unsupported", "failed"]
Setting = dict[str, str | int | float | bool]


@dataclass(frozen=True)
class Sample:
    """One timed call: the round it belongs to, its place within the round, process CPU and wall seconds."""

    round: int
    position: int
    cpu: float
    wall: float


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of a few figures."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value."""
        return cls(min(values), median(values), max(values))

    @property
    def relative(self) -> float:
        """(max - min) / median; 0 when all are equal."""
        return (self.max - self.min) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Bound:
    """A yardstick for time and memory: so many calls of each timed unit (or arm), and so many bytes.

    `bytes` None: the allocator peaks of the named arms are added up instead.
    """

    name: str
    units: dict[str, int]
    bytes: int | None = None


@dataclass(frozen=True)
class Ratio:
    """An arm against a bound: time ratios taken round by round, memory ratio of the allocator peak."""

    cpu: Spread
    wall: Spread
    memory: float | None = None


@dataclass(frozen=True)
class ArmReport:
    """All that was found out about one arm. Only an arm whose `status` is "ok" has times.

    `allocator_peak`: bytes that torch held above the inputs. `resident_growth`: how much a fresh process grew;
    `process_peak`: what it held in all.
    """

    name: str
    status: Status
    reason: str = ""
    note: str = ""
    version: str = ""
    errors: dict[str, Error] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    allocator_peak: int | None = None
    resident_growth: int | None = None
    process_peak: int | None = None

    @property
    def cpu(self) -> Spread | None:
        """Process CPU seconds over the rounds."""
        return Spread.of([sample.cpu for sample in self.samples]) if self.samples else None

    @property
    def wall(self) -> Spread | None:
        """Wall seconds over the rounds."""
        return Spread.of([sample.wall for sample in self.samples]) if self.samples else None


@dataclass(frozen=True)
class Comparison:
    """One table: arms over the same inputs, in the same rounds."""

    title: str
    setting: Setting
    tolerance: dict[str, float]
    bounds: list[Bound]
    units: dict[str, list[Sample]]
    arms: list[ArmReport]

    def arm(self, name: str) -> ArmReport:
        """The report of the arm called `name`; `KeyError` when there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)


@dataclass(frozen=True)
class Record:
    """One run of a benchmark program."""

    program: str
    created: str
    machine: Machine
    comparisons: list[Comparison]
    options: dict[str, str] = field(default_factory=dict)
    schema: Literal["tuna-benchmark/1"] = SCHEMA


_ADAPTER = TypeAdapter(Record)


def write_record(record: Record, path: Path) -> None:
    """Write `record` as indented JSON."""
    path.write_bytes(_ADAPTER.dump_json(record, indent=1) + b"\n")


def read_record(path: Path) -> Record:
    """Read what `write_record` wrote; a `ValueError` (pydantic's) names the field that is wrong, the schema
    too."""
    return _ADAPTER.validate_json(path.read_bytes())
