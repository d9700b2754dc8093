"""A folder in which paid work is written down as it comes in: manifest, journal, lock.

* `journal.jsonl` is append-only, one JSON object a line, on the disk (fsync) before anyone is told that a call is
  done. A process killed at any point loses the calls in flight and nothing else; a torn last line is cut off.
* `manifest.json` holds the parameters that decide what the answers mean. A folder takes one set of them.
* `lock` is held by the process at work (and freed by the system when it dies).
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tuna.budget import Usage
from tuna.report import write_json

__all__ = ["FolderInUse", "Journal", "OtherParameters", "content_key"]

JOURNAL, MANIFEST, LOCK = "journal.jsonl", "manifest.json", "lock"


class OtherParameters(ValueError):
    """The folder holds work done with other parameters."""


class FolderInUse(ValueError):
    """Another process works in the folder."""


def content_key(content: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its fields: 64 hexadecimal digits.

    Example:
        >>> content_key({"a": 1, "b": "é"}) == content_key({"b": "é", "a": 1})
        True
    """
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Place:
    offset: int
    length: int


class Journal:
    """The answers paid for so far, by key. Use as a context manager.

    Args:
        folder: made where it does not exist.
        tool: the command at work; part of the manifest.
        parameters: JSON values that decide what an answer means. No secrets: they are written to the manifest.

    Attributes:
        spent: tokens of all calls in the journal, those included that brought nothing.
        calls: their number.
        lost: how many of them brought nothing.

    Raises:
        FolderInUse: another process holds the lock.
        OtherParameters: the manifest names other parameters; the message says which.
        ValueError: a line (not a torn last one) is no journal entry.
    """

    def __init__(self, folder: str | os.PathLike[str], tool: str, parameters: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.tool, self.parameters = tool, dict(parameters)
        self.calls, self.lost, self.spent = 0, 0, Usage(0, 0)
        self._places: dict[str, _Place] = {}
        self._pending: list[bytes] = []
        self._taken = self._written = 0  # entries handed in, entries on the disk
        self._broken: OSError | None = None
        self._turn = asyncio.Lock()
        self._writing = threading.Lock()

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._check_manifest()
            self._file = (self.folder / JOURNAL).open("a+b", buffering=0)
            try:
                self._load()
            except BaseException:
                self._file.close()
                raise
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._broken is None:
                self._flush()  # what a cancelled task left
        finally:
            self._file.close()
            self._lock.close()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Any | None:
        """The answer under ``key``, or None. Read from the file: a long run does not live in memory."""
        place = self._places.get(key)
        if place is None:
            return None
        return json.loads(os.pread(self._file.fileno(), place.length, place.offset))["answer"]

    async def add(self, key: str, answer: Any, usage: Usage) -> None:
        """Write an answer down; returns when it is on the disk. Calls side by side share one fsync."""
        await self._append({"key": key, "usage": [usage.input, usage.output], "answer": answer})

    async def add_lost(self, key: str, reason: str, usage: Usage) -> None:
        """Write down a call that was, or may have been, paid for and brought nothing: the budget counts it."""
        await self._append({"key": key, "usage": [usage.input, usage.output], "lost": reason})

    async def _append(self, entry: Mapping[str, Any]) -> None:
        self._pending.append(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
        self._taken += 1
        ticket = self._taken
        async with self._turn:
            if self._written < ticket:
                # Shielded: a thread cannot be cancelled, and what it writes is paid for.
                await asyncio.shield(asyncio.to_thread(self._flush))

    def _flush(self) -> None:
        with self._writing:
            if self._broken is not None:
                raise self._broken
            lines, self._pending = self._pending, []
            if not lines:
                return
            offset = self._file.seek(0, os.SEEK_END)
            try:
                self._write(b"".join(lines))
            except OSError as error:
                # Disk full: nothing may follow a torn line, so nothing more is written.
                self._broken = error
                raise
            for line in lines:
                self._count(json.loads(line), _Place(offset, len(line)))
                offset += len(line)
            self._written += len(lines)

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[os.write(self._file.fileno(), left) :]
        os.fsync(self._file.fileno())

    def _count(self, entry: Mapping[str, Any], place: _Place) -> None:
        used = Usage(*entry["usage"])
        self.calls += 1
        self.spent = self.spent + used
        if "answer" in entry:
            self._places[entry["key"]] = place
        else:
            self.lost += 1

    def _load(self) -> None:
        offset = 0
        for number, line in enumerate(_lines(self._file), start=1):
            if not line.endswith(b"\n"):
                break  # torn: the process died while it wrote
            try:
                self._count(json.loads(line), _Place(offset, len(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.folder / JOURNAL} line {number} is no journal entry: {error}") from error
            offset += len(line)
        if offset < self._file.seek(0, os.SEEK_END):
            self._file.truncate(offset)
            os.fsync(self._file.fileno())

    def _take_lock(self) -> IO[str]:
        file = (self.folder / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            by = f" (process {owner})" if owner else ""
            raise FolderInUse(f"{self.folder} is in use by another run{by}; wait for it or take another") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        wanted = json.loads(json.dumps({"tool": self.tool, "parameters": self.parameters}))
        if not path.exists():
            if (self.folder / JOURNAL).exists():
                raise OtherParameters(f"{self.folder} has a {JOURNAL} without {MANIFEST}; take another folder")
            write_json(path, wanted)
            return
        found = json.loads(path.read_text("utf-8"))
        if found.get("tool") != self.tool:
            raise OtherParameters(f"{self.folder} holds a run of tuna {found.get('tool')}; take another folder")
        earlier, now = found.get("parameters", {}), wanted["parameters"]
        names = [name for name in {**earlier, **now} if not _same(earlier, now, name)]
        if names:
            rows = [f"  {name}: {_show(earlier, name)} there, {_show(now, name)} now" for name in names]
            head = f"{self.folder} holds a run with other parameters:"
            raise OtherParameters("\n".join([head, *rows, "Use those, or another folder."]))


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    return iter(file.readline, b"")


def _same(earlier: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    return (name in earlier) == (name in now) and earlier.get(name) == now.get(name)


def _show(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "absent"
    text = json.dumps(values[name], ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
