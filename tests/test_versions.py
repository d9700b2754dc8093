"""What is supported is said in one place (`tuna_kernels.versions`); metadata, pins and pages agree with it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests import versions as environments
from tests.versions import ROOT, constraints, pins, requirements
from tuna_kernels import versions
from tuna_kernels.gpu import availability
from tuna_kernels.versions import TESTED, release

PYPROJECT: dict[str, Any] = environments.tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = [
    f"3.{minor}" for minor in range(release(TESTED["python"].oldest)[1], release(TESTED["python"].newest)[1] + 1)
]


def test_metadata_asks_for_the_oldest_that_is_supported() -> None:
    asked = {r.name: r.specifier for r in requirements()}
    for name, tested in TESTED.items():
        if name != "python":
            assert asked[name] == SpecifierSet(f">={tested.oldest}"), name
    project = PYPROJECT["project"]
    assert project["requires-python"] == f">={TESTED['python'].oldest}"
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named == PYTHONS
    assert PYPROJECT["tool"]["mypy"]["python_version"] == TESTED["python"].oldest  # finds what that has not
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + TESTED["python"].oldest.replace(".", "")


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_gets_one_pin_of_everything_within_the_supported(python: str) -> None:
    found: dict[str, str] = {}
    for pin in map(Requirement, pins()):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in found, f"{pin.name} is pinned twice for Python {python}"
            (only,) = pin.specifier
            found[pin.name] = only.version
    for name, (oldest, newest) in TESTED.items():
        if name != "python":
            assert release(oldest) <= release(found[name]) <= release(newest), name
    elsewhere = {"trl", "tomli"}  # not made, or not needed, for every Python
    assert found.keys() - elsewhere == {Requirement(pin).name for pin in pins()} - elsewhere


def test_pins_satisfy_what_metadata_asks_for() -> None:
    allowed = {r.name.lower().replace("_", "-"): r.specifier for r in requirements()}
    for pin in map(Requirement, pins()):
        (only,) = pin.specifier
        specifier = allowed.get(pin.name.lower().replace("_", "-"), SpecifierSet())
        assert specifier.contains(only.version), pin


def test_an_environment_of_each_end_holds_what_is_named() -> None:
    for end in environments.ENDS:
        lines = [Requirement(line) for line in constraints(end)]
        names = [line.name for line in lines if line.marker is None]
        assert len(names) == len(set(names))
        for name, tested in TESTED.items():
            if name != "python":
                assert Requirement(f"{name}=={getattr(tested, end)}") in lines
    assert "accelerate==1.10" in constraints("oldest")


def test_the_first_page_names_the_range_of_python_and_torch() -> None:
    text = (ROOT / "README.md").read_text()
    assert f"Python {TESTED['python'].oldest} to {TESTED['python'].newest}" in text
    assert f"torch {'.'.join(TESTED['torch'].oldest.split('.')[:2])}" in text


def test_versions_outside_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"python": "3.9.1", "torch": "2.99.0+cu130", "numpy": None, "triton": "3.6.0", "transformers": "5.24.9.dev0"}
    monkeypatch.setattr(versions, "installed", here.get)
    assert versions.warnings() == [
        f"python 3.9.1 is older than {TESTED['python'].oldest}, the oldest supported",
        f"torch 2.99.0+cu130 is newer than {TESTED['torch'].newest}, the newest tested",
    ]
    here["numpy"] = "2.4.6"
    assert "does not work with NumPy 2.4.6" in versions.warnings()[-1]
    if availability.INSTALLED:
        monkeypatch.setattr(availability, "is_interpreted", lambda: True)
        monkeypatch.setattr(availability, "INTERPRETER_CLASH", versions.interpreter_clash())
        assert "install numpy<2.4" in availability.why_not_here()


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cu130", (2, 13, 0)), ("3.13.0rc1", (3, 13, 0)), ("5.0.0.dev0", (5, 0, 0)), ("", ())],
)
def test_the_numbers_of_a_version(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers
