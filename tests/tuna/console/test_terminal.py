"""Law of the terminal: no text that is not ours can do anything but be read."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from tuna.cli import main
from tuna.console.terminal import Terminal, complain, log_visibly, say, visible

NASTY = "\x1b[2J\x1b]0;owned\x07\x1b[8mhid\x9b31m\u202eturned\u2066\u200b\x7f\rover [red]mark-up[/nope] :smile: \ud83d"
ACTS = ["\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\u200b", "\x7f", "\r", "\ud83d"]


def written(*, encoding: str = "utf-8") -> tuple[Terminal, io.TextIOWrapper]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")
    console = Terminal()
    console.file = file
    return console, file


def text_of(file: io.TextIOWrapper) -> str:
    file.flush()
    return bytes(file.buffer.getvalue()).decode(file.encoding)  # type: ignore[attr-defined]


def test_what_a_terminal_would_act_on_is_written_out() -> None:
    assert visible("a\tb\nc é 木 🦊") == "a\tb\nc é 木 🦊"
    assert not any(character in visible(NASTY) for character in ACTS)
    assert visible("\x1b\x9b\u202e\ud83d\U000e0041") == r"\x1b\x9b\u202e\ud83d\U000e0041"
    assert visible("é木", "ascii") == r"\xe9\u6728"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_way_of_a_console_is_safe(encoding: str) -> None:
    console, file = written(encoding=encoding)
    table = Table(NASTY, title=NASTY, caption=NASTY)
    table.add_row(NASTY)
    table.add_row(Text(NASTY))
    console.print(NASTY, table, Text(NASTY, style="yellow"))
    console.print(NASTY, soft_wrap=True, style="bold")
    console.rule(NASTY)
    with console.status(NASTY):
        pass
    text = text_of(file)
    assert not any(character in text for character in ACTS)
    assert "[red]mark-up[/nope]" in text and ":smile:" in text and r"\x1b[2J" in text


def test_lines_and_logs_are_safe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest's own handler at the root would keep the raw text for its report, which no encoding takes
    monkeypatch.setattr(logging.getLogger("tuna"), "propagate", False)
    say(NASTY)
    complain(NASTY)
    log_visibly()
    logging.getLogger("tuna.train.trainer").warning("left out: %s", NASTY)
    out, err = capsys.readouterr()
    assert not any(character in (out + err).replace("\n", "") for character in ACTS)
    assert err.count("owned") == 2


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_data_is_shown_as_text(tmp_path: Path, more: list[str]) -> None:
    data = tmp_path / "nasty.jsonl"
    nasty = NASTY.replace("\ud83d", "")
    rows = [
        {"id": nasty, "prompt": nasty, "responses": [nasty, "x"], "scores": [1, 0]},
        {nasty: 1, "prompt": NASTY, "responses": [nasty]},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, "-m", "tuna", "data", "validate", str(data), *more], capture_output=True, check=False
    )
    assert done.returncode == 1
    text = done.stdout.decode() + done.stderr.decode()
    assert not any(character in text for character in ACTS)
    if more:
        assert json.loads(done.stdout)["records"] == 1
    else:
        assert r"\x1b[8mhid" in text


def test_errors_and_file_names_are_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "validate", str(tmp_path / "\x1b[2Jabsent.jsonl")])
    assert stopped.value.code == 2
    assert r"\x1b[2Jabsent.jsonl" in capsys.readouterr().err


def test_ctrl_c_before_a_command_runs_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tuna.cli.app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["info"])
    assert ended.value.code == 130
