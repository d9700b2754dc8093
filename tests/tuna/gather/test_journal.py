"""Laws of the journal: what is in it is never paid for again, what is spoilt is passed over and told, and a folder that
holds answers takes one set of parameters and one process."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tuna.gather.misbehaving import Misbehaving
from tests.tuna.gather.test_endpoint import ask_all
from tuna.gather.api.budget import Usage
from tuna.gather.api.journal import Journal, OtherParameters, content_key
from tuna.system.locks import FolderInUse


@pytest.mark.parametrize("cut", range(0, 140, 7))
def test_a_torn_last_line_is_cut_off_and_asked_again(cut: int, tmp_path: Path) -> None:
    with Misbehaving() as server:
        first, _ = ask_all(server, tmp_path, 3, concurrency=1)
        path = tmp_path / "journal.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[: max(0, len(whole) - 1 - cut)])
        left = path.read_bytes().count(b"\n")
        second, calls = ask_all(server, tmp_path, 3, concurrency=1)
        assert calls.found == left and calls.made == 3 - left
        assert path.read_bytes() == whole
    assert first.results == second.results


SPOILT = {
    "no JSON": b"{spoilt",
    "no UTF-8": b'{"key": "\xff\xfe"}',
    "half a line and another": b'{"key": "ab", "usa{"key": "cd", "usage": [1, 2], "lost": "x"}',
    "another version": b'{"version": 9, "entry": ["a", "b"]}',
    "no object": b"[1, 2]",
    "nested": b"[" * 100_000,
    "a number without end": b'{"key": ' + b"9" * 9000,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_line_is_passed_over_told_and_asked_again(name: str, tmp_path: Path) -> None:
    """It stays in the file, counts as a call, and costs one record another call; the others are not paid again."""
    with Misbehaving() as server:
        first, _ = ask_all(server, tmp_path, 3)
        path = tmp_path / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + SPOILT[name] + b"\n" + lines[2])
        second, calls = ask_all(server, tmp_path, 3)
        assert server.calls == 4 and calls.found == 2 and calls.made == 1
    assert second.results == first.results
    assert "journal.jsonl line 2: not a journal entry" in calls.journal.notes[0] and len(calls.journal.notes) == 1
    assert calls.budget.calls == 4 and calls.journal.lost == 1
    assert SPOILT[name] in path.read_bytes()


@pytest.mark.parametrize("used", ["[1.5, 2]", f"[1{'0' * 400}, 2]", "[-1, 2]", "null", "[1]", '["a", 2]', "[NaN, 2]"])
def test_tokens_of_an_older_journal_that_are_none_lose_no_answer(used: str, tmp_path: Path) -> None:
    with Misbehaving() as server:
        first, _ = ask_all(server, tmp_path, 2, concurrency=1)
        path = tmp_path / "journal.jsonl"
        path.write_text(re.sub(r'"usage": \[\d+, \d+\]', f'"usage": {used}', path.read_text()))
        second, calls = ask_all(server, tmp_path, 2)
        assert server.calls == 2 and calls.found == 2
    assert second.results == first.results and len(calls.journal.notes) == 2 and calls.budget.spent == Usage(0, 0)


def filed(folder: Path, tool: str, parameters: dict[str, Any]) -> None:
    with Journal(folder, tool, parameters) as journal:
        asyncio.run(journal.add(content_key("a"), "b", Usage(1, 1)))


def test_other_parameters_are_refused_by_name(tmp_path: Path) -> None:
    filed(tmp_path, "generate", {"model": "a", "n": 4, "stop": None})
    filed(tmp_path, "generate", {"stop": None, "model": "a", "n": 4})
    with pytest.raises(OtherParameters, match=r'(?s)model: "a" before, "b" now.*seed: absent before, 1 now') as raised:
        Journal(tmp_path, "generate", {"model": "b", "n": 4, "stop": None, "seed": 1}).__enter__()
    assert " n:" not in str(raised.value)
    with pytest.raises(OtherParameters, match="tuna generate"):
        Journal(tmp_path, "judge", {"model": "a", "n": 4, "stop": None}).__enter__()


def test_a_folder_without_answers_takes_other_parameters(tmp_path: Path) -> None:
    with Journal(tmp_path, "generate", {"model": "a"}):
        assert not (tmp_path / "manifest.json").exists()
    with Journal(tmp_path, "generate", {"model": "b"}) as journal:
        asyncio.run(journal.add_lost(content_key("a"), "a page of another server", Usage(1, 1)))
    filed(tmp_path, "generate", {"model": "c"})
    assert json.loads((tmp_path / "manifest.json").read_text())["parameters"] == {"model": "c"}
    with pytest.raises(OtherParameters), Journal(tmp_path, "generate", {"model": "a"}):
        pass


def test_a_probe_binds_a_folder_to_nothing_and_counts_once(tmp_path: Path) -> None:
    key = content_key("probe")
    with Journal(tmp_path, "generate", {"model": "a"}) as journal:
        asyncio.run(journal.add(key, "no log-probabilities", Usage(1, 1), probe=True))
    with Journal(tmp_path, "generate", {"model": "a"}) as journal:
        assert journal.get(key) == "no log-probabilities" and journal.calls == 1
    with Journal(tmp_path, "generate", {"model": "a", "base_url": "another"}) as journal:
        assert journal.get(key) is None and journal.calls == 1, "another endpoint is probed again"
    filed(tmp_path, "generate", {"model": "b"})
    with pytest.raises(OtherParameters), Journal(tmp_path, "generate", {"model": "a"}):
        pass


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"parameters": 3}'])
def test_a_manifest_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    filed(tmp_path, "generate", {})
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json"), Journal(tmp_path, "generate", {}):
        pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path, "test", {}), pytest.raises(FolderInUse, match="in use"):
        Journal(tmp_path, "test", {}).__enter__()
    with Journal(tmp_path, "test", {}):
        pass


def test_entries_side_by_side_are_all_on_the_disk(tmp_path: Path) -> None:
    async def go(journal: Journal) -> None:
        await asyncio.gather(*(journal.add(content_key(i), {"i": i}, Usage(1, 2)) for i in range(300)))

    with Journal(tmp_path, "test", {}) as journal:
        asyncio.run(go(journal))
        assert [journal.get(content_key(i)) for i in range(300)] == [{"i": i} for i in range(300)]
    with Journal(tmp_path, "test", {}) as journal:
        assert len(journal) == 300 and journal.spent == Usage(300, 600) and journal.get(content_key("x")) is None
