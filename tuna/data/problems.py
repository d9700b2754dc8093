"""Rows that cannot be used: their reasons, and whether a reader fails or skips them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from pydantic import ValidationError

from tuna.data.files import Rows
from tuna.system.validation import place, reason

__all__ = ["BadRecords", "OnBad", "Problem", "problem_lines", "read_rows", "settle_problems"]

OnBad: TypeAlias = Literal["fail", "skip"]
SPELLED_OUT = 5  # problems listed in a BadRecords error
SHOWN = 10  # problems printed


class Named(Protocol):
    """An item with an id."""

    @property
    def id(self) -> str:
        """Unique name within its file."""


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Problem:
    """Why a record cannot be used.

    Attributes:
        file: its file; "" for records from memory.
        line: its line (from 1) if `unit` is "line", its index (from 0) if it is "index", or None.
        reason: why, as shown to the user.
        unit: what `line` counts.
    """

    file: str
    line: int | None
    reason: str
    unit: Literal["line", "index"] = "line"

    def __str__(self) -> str:
        place = " ".join(
            part for part in (self.file, f"{self.unit} {self.line}" if self.line is not None else "") if part
        )
        return f"{place}: {self.reason}" if place else self.reason


class BadRecords(ValueError):
    """Records that cannot be used: `problems` has all, the message their number and the first few."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        lines = [f"  {problem}" for problem in self.problems[:SPELLED_OUT]]
        if count > SPELLED_OUT:
            lines.append(f"  … and {count - SPELLED_OUT} more")
        head = f"{count} record{'s' * (count != 1)} cannot be used (on_bad='skip' leaves them out):"
        super().__init__("\n".join([head, *lines]))


def settle_problems(problems: Sequence[Problem], on_bad: OnBad) -> None:
    """Raise `BadRecords` if there are problems and `on_bad` is "fail".

    Raises:
        BadRecords: there are problems and `on_bad` is "fail".
        ValueError: `on_bad` is neither "fail" nor "skip".
    """
    if on_bad not in ("fail", "skip"):
        raise ValueError(f"on_bad = {on_bad!r} is neither 'fail' nor 'skip'")
    if problems and on_bad == "fail":
        raise BadRecords(problems)


def problem_lines(problems: Sequence[Problem] | Sequence[str]) -> list[str]:
    """The lines printed for skipped rows: the first problems and the number of the others."""
    lines = [f"left out: {problem}" for problem in problems[:SHOWN]]
    return lines + [f"… and {len(problems) - SHOWN} more left out"] * (len(problems) > SHOWN)


def read_rows(rows: Rows, parse: Callable[[Any, str], T], on_bad: OnBad, unnamed: str) -> tuple[list[T], list[Problem]]:
    """Convert rows to items; also returns the problems of those skipped (with `on_bad="skip"`).

    Args:
        rows: the rows.
        parse: makes an item of a row and a default id; raises `ValueError` for a row that cannot be used.
        on_bad: "fail" raises one error that lists the problems.
        unnamed: prefix of the default ids of rows from memory; for a file it is the file's name.

    Of a duplicate id, the later row is a problem.

    Raises:
        BadRecords: with `on_bad="fail"`, some row cannot be used.
    """
    settle_problems((), on_bad)
    stem = Path(rows.name).stem or unnamed
    items: list[T] = []
    problems: list[Problem] = []
    places: dict[str, int] = {}
    for number, row in rows.items:
        try:
            item = parse(row, f"{stem}-{number}")
            if item.id in places:
                raise ValueError(f"duplicate id {item.id!r}, first at {rows.unit} {places[item.id]}")
        except ValueError as error:
            problems.append(Problem(rows.name, number, _plain(error), rows.unit))
            continue
        places[item.id] = number
        items.append(item)
    settle_problems(problems, on_bad)
    return items, problems


def _plain(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(_detail(detail) for detail in error.errors()[:3])


def _detail(detail: Any) -> str:
    field = place(detail["loc"])
    return f"field {field!r} is missing" if detail["type"] == "missing" else f"{field} {reason(detail)}".strip()
