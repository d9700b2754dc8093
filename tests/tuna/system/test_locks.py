"""Laws: a folder is one process's at a time; one that died blocks nobody; a held folder is left as it was found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tuna import launching
from tests.tuna.train.test_cli_train import EXAMPLES, invoke
from tuna.system.locks import LOCK, FolderInUse, hold
from tuna.train.checkpoints import begin_run

HOLDER = """
import pathlib, sys, time
from tuna.system.locks import hold
with hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, env=launching.environment()
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_and_a_dead_first_blocks_nobody(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    try:
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "run")
        for name in ("run", "link", "run/../run"):
            with (
                pytest.raises(FolderInUse, match=rf"in use by another run \(process {process.pid} on "),
                hold(tmp_path / name),
            ):
                pass
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "run" / LOCK).exists()  # as a kill leaves it
    with hold(tmp_path / "run"), hold(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with hold(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with hold(tmp_path / "new"):
        (tmp_path / "new" / "file").write_text("")
    assert (tmp_path / "new" / "file").exists()


def test_a_run_that_has_begun_is_in_use_before_it_is_there(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    try:
        begin_run(tmp_path / "run")
        words = ["train", "--model", "tiny", "--data", str(EXAMPLES), "--output", str(tmp_path / "run")]
        for more in ([], ["--resume"], ["--overwrite"]):
            assert isinstance(invoke(*words, *more).exception, FolderInUse)
    finally:
        process.kill()
        process.wait()
