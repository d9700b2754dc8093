"""Versions of Python, and of the packages that results depend on, with which the tests have passed.

The single source: `pyproject.toml` requires the oldest, `make test-versions` runs the suite with all the oldest and
all the newest, `tuna info` warns about others, README.md names them (tests/test_versions.py checks that they agree).
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from typing import NamedTuple


class Tested(NamedTuple):
    """The oldest supported version and the newest tested one; its later patch releases count as tested."""

    oldest: str
    newest: str


TESTED = {
    "python": Tested("3.10", "3.13"),
    "torch": Tested("2.11.0", "2.14.1"),
    "numpy": Tested("1.26.4", "2.4.6"),
    "triton": Tested("3.6.0", "3.8.0"),
    "transformers": Tested("5.17.0", "5.24.0"),
}


def installed(name: str) -> str | None:
    """The installed version of Python or a distribution; None if not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without build or pre-release parts: `2.13.0+cu130` is (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def warnings() -> list[str]:
    """A line for each of `TESTED` whose installed version is outside its range, and for incompatible versions."""
    found = []
    for name, (oldest, newest) in TESTED.items():
        here = installed(name)
        if here is None:
            continue
        if release(here) < release(oldest):
            found.append(f"{name} {here} is older than {oldest}, the oldest supported")
        elif release(here)[:2] > release(newest)[:2]:
            found.append(f"{name} {here} is newer than {newest}, the newest tested")
    return [*found, *filter(None, [interpreter_clash()])]


def interpreter_clash() -> str:
    """ "" unless Triton's interpreter (not its compiler) fails with this NumPy."""
    triton, numpy = installed("triton"), installed("numpy")
    if triton and numpy and release(triton) < (3, 7) and release(numpy) >= (2, 4):
        return f"Triton {triton}'s interpreter does not work with NumPy {numpy}: install numpy<2.4 or triton>=3.7"
    return ""
