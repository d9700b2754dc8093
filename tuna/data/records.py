"""`Record`, the validated record of ranked data, and reading and writing files of records.

A record is a prompt with k responses and their order. The direction is part of the field's name: in `scores` higher is
better, in `ranks` 0 or 1 comes first and is best. A reversed order is a common silent bug, so the direction is never
guessed. Other formats are in `tuna.data.formats`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from tuna.data.files import Unreadable, open_rows, write_rows
from tuna.data.formats import FORMATS, convert_row, detect_format, known_formats
from tuna.data.problems import BadRecords, OnBad, Problem, read_rows, settle_problems
from tuna.data.prompts import check_turn, check_unread_prompt, joined

__all__ = [
    "BadRecords",
    "Message",
    "Record",
    "RecordSet",
    "read_records",
    "write_records",
]


def _integral(value: Any) -> Any:
    """1.0 as 1: pandas and parquet turn a column of integers with missing values into floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid Unicode: it contains half of a surrogate pair") from error
    return value


Text: TypeAlias = Annotated[str, AfterValidator(_encodable)]
Score: TypeAlias = Annotated[float, Field(strict=True)]
Rank: TypeAlias = Annotated[int, Field(strict=True), BeforeValidator(_integral)]


class Message(BaseModel):
    """One turn of a conversation: `role` (system, user, assistant, tool, …) and `content`, a text or a list of parts.

    A turn with other content (tool calls, images, separate reasoning) is rejected; metadata such as an id is ignored.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: Text = Field(min_length=1)
    content: Text

    @model_validator(mode="before")
    @classmethod
    def _carried(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        check_turn(value)
        return {**value, "content": joined(value["content"])} if "content" in value else value


class Record(BaseModel):
    """A prompt, its k >= 1 responses and their order.

    Unknown fields are ignored, except those that belong to a prompt (`system`, `tools`, …), which are rejected.

    Attributes:
        id: unique name within its file.
        prompt: the prompt as text; give exactly one of `prompt` and `messages`.
        messages: the prompt as turns of a conversation; the last turn must not be the assistant's.
        responses: k texts; duplicates and empty ones are allowed.
        scores: k finite numbers, **higher is better**; equal scores are ties.
        ranks: k integers from 0 or 1 up, **the lowest is best**; equal ranks are ties. Give at most one of
            `scores` and `ranks`; one is required if k > 1.

    Raises:
        pydantic.ValidationError: a rule above is violated (a `ValueError`).

    Examples:
        >>> record = Record(id="a", prompt="2+2?", responses=["5", "4", "four"], scores=[0, 9, 9])
        >>> record.dense_ranks(), record.best(), record.worst()
        ([1, 0, 0], 1, 0)
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Text = Field(min_length=1)
    prompt: Text | None = None
    messages: list[Message] | None = None
    responses: list[Text] = Field(min_length=1)
    scores: list[Score] | None = None
    ranks: list[Rank] | None = None

    @model_validator(mode="before")
    @classmethod
    def _carried(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            check_unread_prompt(value)
        return value

    @model_validator(mode="after")
    def _check(self) -> Record:
        self._check_prompt()
        count = len(self.responses)
        if self.scores is not None and self.ranks is not None:
            raise ValueError("both 'scores' and 'ranks' are given; give one of them")
        if self.scores is None and self.ranks is None and count > 1:
            raise ValueError(f"{count} responses need 'scores' (higher is better) or 'ranks' (0 or 1 is best)")
        for name, values in (("scores", self.scores), ("ranks", self.ranks)):
            if values is not None and len(values) != count:
                raise ValueError(f"{name!r} has {len(values)} values for {count} responses")
        for i, score in enumerate(self.scores or ()):
            if not math.isfinite(score):
                raise ValueError(f"scores[{i}] = {score} is not a finite number")
        if self.ranks is not None and (min(self.ranks) not in (0, 1) or max(self.ranks) - min(self.ranks) >= count):
            raise ValueError(
                f"ranks = {self.ranks} must count from 0 or 1 (the best) over {count} responses; "
                "values where higher is better belong in 'scores'"
            )
        return self

    def _check_prompt(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            both = "both 'prompt' and 'messages' are given" if self.prompt is not None else "the prompt is missing"
            raise ValueError(f"{both}; give exactly one of 'prompt' and 'messages'")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("'prompt' is empty")
        if self.messages is not None:
            if not self.messages:
                raise ValueError("'messages' is empty")
            if self.messages[-1].role == "assistant":
                raise ValueError("the last of 'messages' is the assistant's; answers belong in 'responses'")

    def dense_ranks(self) -> list[int]:
        """Ranks from 0 (best) without gaps, ties equal; all 0 if neither scores nor ranks are given."""
        keys: Sequence[float] = [-score for score in self.scores] if self.scores is not None else self.ranks or []
        level = {key: rank for rank, key in enumerate(sorted(set(keys)))}
        return [level[key] for key in keys] or [0] * len(self.responses)

    def best(self) -> int:
        """Index of the first response of rank 0."""
        return self.dense_ranks().index(0)

    def worst(self) -> int:
        """Index of the last response of the highest rank."""
        ranks = self.dense_ranks()
        return max(range(len(ranks)), key=lambda i: (ranks[i], i))


@dataclass(frozen=True)
class RecordSet:
    """Records read, in order, and the problems of those skipped."""

    records: list[Record]
    problems: list[Problem]


def read_records(
    source: str | os.PathLike[str] | Iterable[Any], *, format: str = "auto", on_bad: OnBad = "fail"
) -> RecordSet:
    """Read ranked records.

    Args:
        source: a `.json` (an array, or an object whose `data` is one), `.jsonl` or `.parquet` file, a folder
            saved by `datasets`, a `datasets.Dataset`, or any iterable of dicts or records.
        format: a key of `tuna.data.formats.FORMATS`, or "auto": the format of the first record whose format is known.
        on_bad: "fail" raises one error that lists the problems, "skip" skips such records and returns the problems.

    Records without an id get one from file and line or index; of a duplicate id, the later record is a problem.

    Raises:
        FileNotFoundError: no such file or folder.
        BadRecords: with `on_bad="fail"`, some record cannot be used.
        ValueError: unknown file type, format or `on_bad`; no record has a known format.
    """
    settle_problems((), on_bad)
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format = {format!r} is unknown; known formats:\n{known_formats()}")
    rows = open_rows(source)
    items = list(rows.items)
    shape = _detect(items, rows.name) if format == "auto" else format
    parse = functools.partial(_to_record, shape=shape, recognised=format == "auto")
    return RecordSet(*read_rows(replace(rows, items=iter(items)), parse, on_bad, unnamed="record"))


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write records in the format `tuna` as JSONL, a JSON array or Parquet, by suffix; atomic.

    Raises:
        ValueError: a suffix other than `.jsonl`, `.ndjson`, `.json`, `.parquet`.
    """
    rows = (record.model_dump(exclude_none=True) for record in records)
    write_rows(path, rows, _parquet_schema() if Path(path).suffix.lower() == ".parquet" else None)


def _detect(items: Sequence[tuple[int, Any]], name: str) -> str:
    """The format of the first row whose format is known; "tuna" if no row is an object."""
    objects = [row for _, row in items if isinstance(row, Mapping)]
    for row in objects:
        if (shape := detect_format(row)) is not None:
            return shape
    if objects:
        keys = ", ".join(map(str, objects[0])) or "none"
        raise ValueError(
            f"{name or 'source'}: no record has a known format (fields of the first: {keys}); "
            f"known formats:\n{known_formats()}"
        )
    return "tuna"


def _to_record(row: Any, made_id: str, *, shape: str, recognised: bool) -> Record:
    if isinstance(row, Record):
        return row
    if isinstance(row, Unreadable):
        raise ValueError(row.reason)
    fields = convert_row(row, shape, recognised=recognised)
    given = fields.get("id", made_id)
    fields["id"] = str(given) if isinstance(given, int | float) else given
    return Record.model_validate(fields)


def _parquet_schema() -> Any:
    """The columns of every file, also of an empty one or one without `messages`."""
    import pyarrow as pa

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("prompt", pa.string()),
            ("messages", pa.list_(turn)),
            ("responses", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float64())),
            ("ranks", pa.list_(pa.int64())),
        ]
    )
