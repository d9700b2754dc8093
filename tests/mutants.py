"""``make mutants``: seeds one fault at a time into the kernels and shows which test catches it. None may survive.

A mutant is a line of the library replaced by a wrong one. For each, the library is copied to a scratch folder, the
line replaced, and the tests named are run there in a process of their own until the first failure. A mutant that no
test catches has *survived*: the tests have a hole. One whose tests cannot even be collected is *broken*: the fault is
not the one that was meant.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "tuna_kernels"
Fate = Literal["caught", "survived", "broken"]


@dataclass(frozen=True)
class Mutant:
    """One fault: in ``file`` (below the library) the text ``right``, which occurs once, becomes ``wrong``."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    interpret: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: ``caught`` by the test named, ``survived``, or ``broken`` (the last line of pytest)."""

    name: str
    fate: Fate
    test: str


def seed(mutant: Mutant, root: Path) -> None:
    """Write the fault into the copy of the library below ``root``.

    Raises:
        ValueError: the text to replace is not there exactly once.
    """
    path = root / LIBRARY / mutant.file
    source = path.read_text(encoding="utf-8")
    if (count := source.count(mutant.right)) != 1:
        raise ValueError(f"mutant {mutant.name!r}: {mutant.right!r} stands {count} times in {mutant.file}, not once")
    path.write_text(source.replace(mutant.right, mutant.wrong), encoding="utf-8")


def run(mutant: Mutant) -> Outcome:
    """Copy, seed, test."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        root = Path(scratch)
        shutil.copytree(ROOT / LIBRARY, root / LIBRARY, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("tests", "tuna", "benchmarks", "pyproject.toml"):
            (root / name).symlink_to(ROOT / name)
        seed(mutant, root)
        environment = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        environment |= {"TRITON_INTERPRET": str(int(mutant.interpret)), "HYPOTHESIS_PROFILE": "unshrunk"}
        words = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(root), *mutant.tests]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words], cwd=root, env=environment, capture_output=True, text=True
        )
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return Outcome(mutant.name, "survived", "")
    if done.returncode == 1 and failed:
        return Outcome(mutant.name, "caught", failed[0])
    # A wild address may end the process: pytest's fault handler names the test.
    if done.returncode < 0 and (died := re.search(r'File "\S*?(tests/\S+)", line \d+ in (test_\w+)', done.stderr)):
        return Outcome(mutant.name, "caught", f"{died[1]}::{died[2]} (signal {-done.returncode})")
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    return Outcome(mutant.name, "broken", lines[-1])


def main() -> None:
    """Seed all mutants, or those named; exit with 1 unless every one is caught."""
    from tests.mutants_list import MUTANTS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only mutants whose name contains one of these")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="write the outcomes to this file as JSON")
    told = parser.parse_args()
    chosen = [m for m in MUTANTS if not told.names or any(name in m.name for name in told.names)]
    console = Console()
    with ThreadPoolExecutor(told.processes) as pool:
        progress = track(pool.map(run, chosen), "mutants", total=len(chosen), console=Console(stderr=True))
        outcomes = []
        for one in progress:
            outcomes.append(one)
            print(f"{one.fate}: {one.name}", file=sys.stderr, flush=True)
    table = Table("mutant", "fate", "caught by", title=f"{len(chosen)} seeded faults")
    for one in outcomes:
        table.add_row(one.name, one.fate, escape(one.test), style=None if one.fate == "caught" else "red")
    if not console.is_terminal:
        console.width = 180
    console.print(table)
    if told.output:
        told.output.write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n", encoding="utf-8")
    sys.exit(int(any(one.fate != "caught" for one in outcomes)))


if __name__ == "__main__":
    main()
