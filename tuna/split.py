"""Splitting a file of records into those to train on and those held out, by their ids."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from typing import Any

from tuna.files import Unreadable, open_rows

__all__ = ["hold_out", "rows_with_ids"]


def hold_out(ids: Collection[str], fraction: float, seed: int = 0) -> set[str]:
    """The ids to hold out: ``fraction`` of them (one at least, and never all), chosen by their hash.

    The choice does not depend on the order of the ids.

    Raises:
        ValueError: ``fraction`` not between 0 and 1, or fewer than two ids.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction = {fraction} must be between 0 and 1")
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} record cannot be split: two are needed at least")
    count = min(max(1, round(fraction * len(ids))), len(ids) - 1)
    return set(sorted(ids, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())[:count])


def rows_with_ids(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The rows of a file by their ids, as they stand.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row that is no object, or has no id, or the id of another one.
    """
    rows = open_rows(path)
    found: dict[str, dict[str, Any]] = {}
    for place, row in rows.items:
        where = f"{rows.name} {rows.unit} {place}"
        if isinstance(row, Unreadable):
            raise ValueError(f"{where}: {row.reason}")
        if not isinstance(row, Mapping) or not isinstance(row.get("id"), str | int):
            raise ValueError(f"{where}: has no id, and records are split by their ids")
        name = str(row["id"])
        if name in found:
            raise ValueError(f"{where}: id {name!r} stands there already")
        found[name] = dict(row)
    return found
