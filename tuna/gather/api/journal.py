"""A folder that records paid calls as they are answered: manifest, journal, lock.

* `journal.jsonl` is append-only, one JSON object per line, synced to disk (fsync) before a call counts as done. A
  process killed at any point loses only the calls in flight; an incomplete last line is cut off. Any other invalid
  line is skipped and reported.
* `manifest.json` has the parameters that determine the meaning of the answers; it is written with the first entry. A
  folder with answers accepts only these parameters; one without, or with answers to probes only, accepts others.
* `lock` is held by the running process (and released by the system when it ends).
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

from tuna.gather.api.bodies import clean_text, parse_json
from tuna.gather.api.budget import Usage
from tuna.system.locks import FolderInUse
from tuna.system.writing import sync, write_json

__all__ = ["Journal", "OtherParameters", "content_key"]

JOURNAL, MANIFEST, LOCK = "journal.jsonl", "manifest.json", "lock"
MOST_USED = 10**12  # tokens of a recorded call; a line with more is not trusted


class OtherParameters(ValueError):
    """The folder has a run with other parameters."""


def content_key(content: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its fields: 64 hexadecimal digits.

    Examples:
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
        folder: created if missing.
        tool: the running command; part of the manifest.
        parameters: JSON values that determine the meaning of an answer. No secrets: they are written to the manifest.

    Attributes:
        spent: tokens of all calls in the journal, including those without a usable answer.
        calls: number of these calls.
        lost: number of calls without a usable answer.
        notes: lines that could not be read, or only partly, and why.

    Raises:
        FolderInUse: another process holds the lock.
        OtherParameters: there are answers, and the manifest has other parameters; the message names them.
        ValueError: the manifest cannot be read, or a parameter cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], tool: str, parameters: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.tool = tool
        text = json.dumps({"tool": tool, "parameters": dict(parameters)}, ensure_ascii=False)
        if clean_text(text) != text:
            raise ValueError(f"the parameters of tuna {tool} contain bytes that are not UTF-8 text")
        self.manifest = json.loads(text)
        self.calls, self.lost, self.spent = 0, 0, Usage(0, 0)
        self.notes: list[str] = []
        self._places: dict[str, _Place] = {}
        self._probes: set[str] = set()
        self._pending: list[bytes] = []
        self._taken = self._written = 0  # entries submitted, entries on disk
        self._broken: OSError | None = None
        self._claimed = False
        self._turn = asyncio.Lock()
        self._writing = threading.Lock()

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._file = (self.folder / JOURNAL).open("a+b", buffering=0)
            try:
                self._load()
                self._check_manifest()
                sync(self.folder)
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
                self._flush()  # left by a cancelled task
        finally:
            self._file.close()
            self._lock.close()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Any | None:
        """The answer under `key`, or None; read from the file, so that memory does not grow with the run."""
        place = self._places.get(key)
        if place is None:
            return None
        return parse_json(os.pread(self._file.fileno(), place.length, place.offset), unique=False)["answer"]

    async def add(self, key: str, answer: Any, usage: Usage, *, probe: bool = False) -> None:
        """Record an answer; returns when it is on disk. Concurrent calls share one fsync.

        The answer to a probe does not bind the folder to the parameters.
        """
        entry = {"key": key, "usage": [usage.input, usage.output], "answer": answer}
        await self._append({**entry, "probe": True} if probe else entry)

    async def add_lost(self, key: str, reason: str, usage: Usage) -> None:
        """Record a call without a usable answer that was, or may have been, paid for: the budget counts it."""
        await self._append({"key": key, "usage": [usage.input, usage.output], "lost": reason})

    async def _append(self, entry: Mapping[str, Any]) -> None:
        self._pending.append(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
        self._taken += 1
        ticket = self._taken
        async with self._turn:
            if self._written < ticket:
                # Shielded: a thread cannot be cancelled, and it writes answers that are paid for.
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
                if not self._claimed:
                    write_json(self.folder / MANIFEST, self.manifest)
                    sync(self.folder)
                    self._claimed = True
                self._write(b"".join(lines))
            except OSError as error:
                # Disk full: nothing may follow an incomplete line, so nothing more is written.
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

    def _count(self, entry: Any, place: _Place) -> str | None:
        """Count an entry; returns what is wrong with it, or None.

        Raises:
            ValueError: not a valid entry.
        """
        if not isinstance(entry, Mapping) or not isinstance(entry.get("key"), str):
            raise ValueError("not an object with a key")
        if ("answer" in entry) == ("lost" in entry):
            raise ValueError("neither an answer nor a lost call")
        self.calls += 1
        used = _usage(entry.get("usage"))
        self.spent = self.spent + (used or Usage(0, 0))
        if "answer" in entry:
            self._places[entry["key"]] = place
            if entry.get("probe") is True:
                self._probes.add(entry["key"])
        else:
            self.lost += 1
        return None if used is not None else "its tokens cannot be read and are not counted"

    def _load(self) -> None:
        offset = 0
        for number, line in enumerate(_lines(self._file), start=1):
            if not line.endswith(b"\n"):
                break  # incomplete: the process died while writing
            try:
                note = self._count(parse_json(line, unique=False), _Place(offset, len(line)))
            except ValueError as error:
                note = f"not a journal entry ({error}), skipped"
                self.calls, self.lost = self.calls + 1, self.lost + 1
            if note is not None:
                self.notes.append(f"{self.folder / JOURNAL} line {number}: {note}")
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
            raise FolderInUse(f"{self.folder} is in use by another run{by}; wait or use another folder") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        if self._places.keys() <= self._probes:
            # No answers that other parameters could be mixed with: the first entry claims the folder.
            if _read(path) != self.manifest:
                self._places.clear()  # another endpoint is probed again
            return
        self._claimed = True
        if not path.exists():
            raise OtherParameters(f"{self.folder} has a {JOURNAL} without {MANIFEST}; use another folder")
        try:
            found = parse_json(path.read_bytes(), unique=False)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}); use another folder") from error
        if not isinstance(found, dict) or not isinstance(found.get("parameters", {}), dict):
            raise ValueError(f"{path} is not a manifest; use another folder")
        if found.get("tool") != self.tool:
            raise OtherParameters(f"{self.folder} has a run of tuna {found.get('tool')}; use another folder")
        earlier, now = found.get("parameters", {}), self.manifest["parameters"]
        names = [name for name in {**earlier, **now} if not _same(earlier, now, name)]
        if names:
            rows = [f"  {name}: {_show(earlier, name)} before, {_show(now, name)} now" for name in names]
            head = f"{self.folder} has a run with other parameters:"
            raise OtherParameters("\n".join([head, *rows, "Use the earlier ones, or another folder."]))


def _read(path: Path) -> Any:
    """The content of a JSON file, None if it is not JSON."""
    try:
        return parse_json(path.read_bytes(), unique=False)
    except (OSError, ValueError):
        return None


def _usage(value: Any) -> Usage | None:
    """The tokens of an entry, None if they are invalid (earlier versions recorded the endpoint's values unchecked)."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    prompt, output = value
    good = all(type(count) is int and 0 <= count <= MOST_USED for count in value)
    return Usage(prompt, output) if good else None


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
