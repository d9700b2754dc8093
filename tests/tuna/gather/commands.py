"""`tuna generate` and `tuna judge` as a user runs them: in this process, or as one that can be killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from tests.tuna.gather.misbehaving import Misbehaving
from tuna.cli import app

FAST = ["--backoff", "0.01", "--max-backoff", "0.05", "--model", "teacher"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def killed_and_resumed(arguments: list[str], folder: Path, server: Misbehaving, kills: int, seed: int) -> list[int]:
    """Run the command to its end, killed `kills` times (SIGKILL) on the way, at a random number of calls.

    Returns the calls the server had answered at each kill.
    """
    draw, points = random.Random(seed), []
    command = [sys.executable, "-m", "tuna", *arguments, "--output", str(folder)]
    log = folder.parent / "log.txt"
    for _ in range(kills):
        until = sum(server.paid.values()) + draw.randint(1, 5)
        server.hold = until + 3  # on a loaded machine the kill may come late, and should still hit a live process
        with log.open("ab") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, env=os.environ)
            while sum(server.paid.values()) < until and process.poll() is None:
                time.sleep(0.001)
            time.sleep(draw.random() * 0.02)
            assert process.poll() is None, log.read_text()
            process.send_signal(signal.SIGKILL)
            process.wait()
        server.hold = None
        points.append(sum(server.paid.values()))
    with log.open("ab") as sink:
        assert subprocess.run(command, stdout=sink, stderr=sink, check=False).returncode == 0, log.read_text()
    return points
