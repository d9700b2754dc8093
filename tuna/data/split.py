"""Train/test splits by prompt: no prompt is on both sides.

`tuna train --eval-fraction`, `tuna data split` and the demo use the same rule: prompts are ordered by a hash of the
seed and their text, and the first of them are held out with all their records. The choice depends on neither the order
of the records nor their ids, and the same seed and fraction select the same prompts everywhere. Prompts that differ
only in white space, case or Unicode form are equal.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuna.data.files import Unreadable, open_rows
from tuna.data.formats import convert_row, detect_format
from tuna.data.instructions import instruction_fields
from tuna.data.records import Record

__all__ = ["hold_out", "prompt_key", "rows_to_split", "split_records"]

SEED = 42
"""The default of both `tuna data split` and `tuna train`."""


def hold_out(prompts: Collection[str], fraction: float, seed: int = SEED) -> set[str]:
    """The prompts to hold out: `fraction` of the distinct ones (at least one, never all), chosen by hash.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or fewer than two distinct prompts.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction = {fraction} must be between 0 and 1")
    different = set(prompts)
    if len(different) < 2:
        raise ValueError(f"cannot split {len(different)} prompt(s): at least two distinct ones are needed")
    count = min(max(1, round(fraction * len(different))), len(different) - 1)
    return set(sorted(different, key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode()).digest())[:count])


def split_records(records: Sequence[Record], fraction: float, seed: int = SEED) -> tuple[list[Record], list[Record]]:
    """The training records, and those held out with `fraction` of the prompts, both in the order given.

    Raises:
        ValueError: as `hold_out`.
    """
    keys = [prompt_key(record.prompt if record.messages is None else record.messages) for record in records]
    held = hold_out(keys, fraction, seed)
    pairs = list(zip(records, keys, strict=True))
    return [record for record, key in pairs if key not in held], [record for record, key in pairs if key in held]


def prompt_key(prompt: Any) -> str:
    """A key that is equal for equal prompts, given as text or as turns (objects or `Message`s).

    Examples:
        >>> prompt_key("Name a  fish.") == prompt_key([{"role": "user", "content": "name a fish."}])
        True
    """
    if isinstance(prompt, str):
        return _plain(prompt)
    turns = [turn if isinstance(turn, Mapping) else turn.model_dump() for turn in prompt]
    if len(turns) == 1 and turns[0]["role"] == "user":
        return _plain(turns[0]["content"])
    return json.dumps([[turn["role"], _plain(turn["content"])] for turn in turns])


@dataclass(frozen=True)
class SplitRow:
    """An unchanged row of a file, with its id and the key of its prompt if it has them."""

    row: dict[str, Any]
    id: str | None
    prompt: str | None

    @property
    def key(self) -> str:
        """The key by which it is held out."""
        return self.prompt if self.prompt is not None else f"id {self.id}"


def rows_to_split(path: str | os.PathLike[str]) -> list[SplitRow]:
    """The rows of a file in any format of records, instructions or responses.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row is not an object, has neither a prompt nor an id, or a duplicate id.
    """
    rows = open_rows(path)
    found: list[SplitRow] = []
    ids: set[str] = set()
    for place, row in rows.items:
        where = f"{rows.name} {rows.unit} {place}"
        if isinstance(row, Unreadable):
            raise ValueError(f"{where}: {row.reason}")
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: must be an object with named fields")
        name = str(row["id"]) if isinstance(row.get("id"), str | int) else None
        if name is not None and name in ids:
            raise ValueError(f"{where}: duplicate id {name!r}")
        item = SplitRow(dict(row), name, _prompt_in(row))
        if item.id is None and item.prompt is None:
            raise ValueError(f"{where}: has neither a readable prompt nor an id, and rows are split by these")
        if name is not None:
            ids.add(name)
        found.append(item)
    return found


def _prompt_in(row: Mapping[str, Any]) -> str | None:
    """The key of a row's prompt, None if it has no readable prompt."""
    shape = detect_format(row)
    try:
        fields = instruction_fields(row) if shape is None else convert_row(row, shape)
        return prompt_key(fields.get("prompt", fields.get("messages")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
