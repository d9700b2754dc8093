"""Raw rows of JSON, JSONL and Parquet files, `datasets` folders and objects, with their line or index.

A row is any JSON value; what a record is, is not known here. A line that cannot be parsed is returned as `Unreadable`,
and reading goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuna.system.writing import replacing

__all__ = ["Rows", "Unreadable", "open_rows", "write_rows"]

SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BOM = b"\xef\xbb\xbf"  # Windows editors write it before UTF-8 text


@dataclass(frozen=True)
class Unreadable:
    """A line that is not JSON, and why."""

    reason: str


@dataclass(frozen=True)
class Rows:
    """A stream of rows.

    Attributes:
        name: the file or folder, "" for rows from memory.
        unit: what the places count: lines from 1, or indices from 0.
        items: (place, row or `Unreadable`), in order; can be iterated once.
    """

    name: str
    unit: Literal["line", "index"]
    items: Iterator[tuple[int, Any]]


def open_rows(source: str | os.PathLike[str] | Iterable[Any]) -> Rows:
    """The rows of a file, a folder saved by `datasets`, a `datasets.Dataset` or an iterable.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: unknown file type; JSON that is not a list of records; several splits and none chosen.
        TypeError: `source` is none of these.
    """
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source))
    if isinstance(source, Mapping):
        raise ValueError(f"source is a dict; pass one of its splits: {', '.join(map(str, source)) or 'none found'}")
    if not isinstance(source, Iterable):
        raise TypeError(f"source is a {type(source).__name__}, neither a path nor an iterable of records")
    return Rows("", "index", enumerate(iter(source)))


def write_rows(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]], parquet_schema: Any = None) -> None:
    """Write rows atomically as JSONL, a JSON array or Parquet, by suffix; missing folders are created.

    Raises:
        ValueError: a suffix other than `.jsonl`, `.ndjson`, `.json`, `.parquet`.
    """
    path = Path(path)
    kind = _kind_of(path)
    with replacing(path) as file:
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=parquet_schema), file)
        elif kind == "json":
            file.write((json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n").encode())
        else:
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)


def _open_path(path: Path) -> Rows:
    if path.is_dir():
        return Rows(str(path), "index", enumerate(_saved_dataset(path)))
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    kind = _kind_of(path)
    if kind == "parquet":
        return Rows(str(path), "index", enumerate(_parquet_rows(path)))
    if kind == "json":
        values = _json_rows(path)
        if values is not None:
            return Rows(str(path), "index", enumerate(values))
    elif _first_byte(path) == b"[":
        # Some .jsonl files are arrays (and some .json files hold lines, see above).
        return Rows(str(path), "index", enumerate(_json_rows(path) or []))
    return Rows(str(path), "line", _lines(path))


def _kind_of(path: Path) -> str:
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown file type; the suffix must be one of {', '.join(SUFFIXES)}")
    return kind


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(BOM).lstrip()[:1]


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    # Read as bytes: only \n ends a line, never a U+2028 or a \r inside a text.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM).strip() if number == 1 else line.strip()
            if line:
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 text (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return Unreadable(f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets a thousand deep
        return Unreadable(f"not readable JSON: {error}")


def _json_rows(path: Path) -> list[Any] | None:
    """The records of a JSON document, None if the file has one document per line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        document = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            return None
        raise ValueError(f"{path} line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    if isinstance(document, dict):
        # A single record on a single line is a JSONL file of one record.
        if not isinstance(document.get("data"), list):
            return [document]
        document = document["data"]
    if not isinstance(document, list):
        raise ValueError(f"{path}: neither a list of records nor an object with a list under 'data'")
    return document


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error


def _saved_dataset(path: Path) -> Iterable[Any]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: not a folder saved by datasets (save_to_disk)") from error
    if isinstance(saved, Mapping):
        if len(saved) != 1:
            splits = ", ".join(str(path / split) for split in saved)
            raise ValueError(f"{path} has several splits; give one of them: {splits}")
        saved = next(iter(saved.values()))
    rows: Iterable[Any] = saved
    return rows
