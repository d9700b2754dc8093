"""Runs a planned recipe: one process per step, servers while a step needs them, no completed step again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tuna.recipe.steps import PlannedServer, PlannedStep
from tuna.system import lifeline
from tuna.system.locks import FolderInUse, hold
from tuna.system.writing import write_json

__all__ = ["StepFailed", "run_steps"]

LOG = "log.txt"
START_TIMEOUT = 600.0  # seconds a server may take to load its model
ORPHAN_TIMEOUT = 5.0  # seconds to wait for the step of a run that was killed
PORT_TIMEOUT = 60.0  # seconds to wait for a port to become free
TAIL = 15  # lines of a failed step's log that the error shows


class StepFailed(ValueError):
    """A step failed. The steps before it are done; running the same command again resumes at the failed step."""


def run_steps(
    steps: Sequence[PlannedStep],
    *,
    on_start: Callable[[PlannedStep], None] = lambda step: None,
    on_line: Callable[[str], None] = lambda line: None,
    on_done: Callable[[PlannedStep, bool, float], None] = lambda step, ran, seconds: None,
) -> None:
    """Run the steps in order, except those that are done.

    An interrupted step is run again in its folder, where `tuna generate`, `sample` and `judge` resume from their
    journals and `tuna train` from its last checkpoint. Steps and servers end when this process ends, even if it is
    killed. The folder is locked by this process and by the running step, which may outlive it briefly.

    Args:
        steps: from `tuna.recipe.steps.plan`.
        on_start: called with a step before it runs.
        on_line: called with each line that a step prints; `log.txt` in its folder has all of them.
        on_done: called with a step, whether it ran now, and its seconds.

    Raises:
        FolderInUse: another process runs the recipe.
        StepFailed: a step failed, or a server did not start.
    """
    if steps:
        with _folder(steps[0].folder.parent) as lock:
            _run_steps(steps, lock, on_start, on_line, on_done)


@contextmanager
def _folder(folder: Path) -> Iterator[int | None]:
    """Lock the recipe's folder, waiting briefly for a step left over from a killed run to end."""
    deadline = time.monotonic() + ORPHAN_TIMEOUT
    while True:
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(hold(folder))
            except FolderInUse:
                if time.monotonic() > deadline:
                    raise
            else:
                yield lock
                return
        time.sleep(0.2)


def _run_steps(
    steps: Sequence[PlannedStep],
    lock: int | None,
    on_start: Callable[[PlannedStep], None],
    on_line: Callable[[str], None],
    on_done: Callable[[PlannedStep, bool, float], None],
) -> None:
    servers: dict[str, tuple[PlannedServer, subprocess.Popen[bytes]]] = {}
    try:
        for step in steps:
            if step.done:
                on_done(step, False, 0.0)
                continue
            wanted = {server.name: server for server in step.servers}
            for name in list(servers):
                if wanted.get(name) != servers[name][0]:
                    _stop(servers.pop(name)[1])
            on_start(step)
            step.folder.mkdir(parents=True, exist_ok=True)
            for name, server in wanted.items():
                if name not in servers:
                    servers[name] = (server, _start(server, step.folder.parent / f"server-{name}.log"))
            if step.product.is_file():
                step.product.unlink()  # so that a product found afterwards is from this run
            start = time.perf_counter()
            code = _run(step, lock, on_line)
            seconds = time.perf_counter() - start
            _check(step, code)
            done: dict[str, Any] = {"key": step.key, "command": step.command_line(), "exit_code": code}
            write_json(step.done_file, {**done, "seconds": round(seconds, 3)})
            on_done(step, True, seconds)
    finally:
        for _, process in servers.values():
            _stop(process)


def _run(step: PlannedStep, lock: int | None, on_line: Callable[[str], None]) -> int:
    """Run a step's command and return its exit code."""
    arguments = list(step.arguments)
    if step.step.run == "train" and any(step.folder.glob("checkpoint-*")):
        arguments[arguments.index("--overwrite")] = "--resume"
    command = [sys.executable, "-m", "tuna", *arguments]
    with (step.folder / LOG).open("ab") as log:
        process = lifeline.start(
            command,
            pass_fds=[] if lock is None else [lock],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"COLUMNS": "120", **os.environ},  # a pipe has no width, and tables would be cut to 80
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                on_line(line.decode(errors="replace").rstrip())
        except BaseException:
            # Ctrl-C reached the step too, which finishes its paid calls.
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(60)
            process.kill()
            raise
        return process.wait()


def _check(step: PlannedStep, code: int) -> None:
    if code == 0 or (code == 1 and step.kind.set_aside and step.product.exists()):
        return
    log = step.folder / LOG
    lines = log.read_text(errors="replace").splitlines()[-TAIL:]
    shown = "\n".join(f"  {line}" for line in lines)
    raise StepFailed(f"step {step.step.name!r} failed with exit code {code}; last lines of {log}:\n{shown}")


def _start(server: PlannedServer, log_file: Path) -> subprocess.Popen[bytes]:
    """Start a server and wait until it answers. It ends when its standard input closes, even if we are killed."""
    _wait_for_port(server)
    with log_file.open("ab") as log:
        command = [sys.executable, "-m", "tuna", *server.arguments]
        # In a new session: Ctrl-C must not stop the server while a step finishes its calls.
        process = lifeline.start(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    health = server.url.removesuffix("/v1") + "/health"
    deadline = time.monotonic() + START_TIMEOUT
    try:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                tail = log_file.read_text(errors="replace").splitlines()[-TAIL:]
                shown = "\n".join(f"  {line}" for line in tail)
                raise StepFailed(f"server {server.name!r} did not start; last lines of {log_file}:\n{shown}")
            with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(health, timeout=5):
                return process
            time.sleep(0.2)
        raise StepFailed(f"server {server.name!r} did not answer within {START_TIMEOUT:g} s; see {log_file}")
    except BaseException:
        _stop(process)
        raise


def _wait_for_port(server: PlannedServer) -> None:
    """Wait until the port is free: the server of a killed run takes some seconds to end."""
    address = urlsplit(server.url)
    deadline = time.monotonic() + PORT_TIMEOUT
    while True:
        with socket.socket() as probe:
            if probe.connect_ex((address.hostname, address.port)) != 0:
                return
        if time.monotonic() > deadline:
            raise StepFailed(f"server {server.name!r}: port {address.port} is in use; set another one in the recipe")
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
