"""The seeded faults stay seedable; one of them, end to end, is caught. `make mutants` seeds all."""

import shutil
from pathlib import Path

import pytest

from tests.mutants import LIBRARY, ROOT, Mutant, run, seed
from tests.mutants_list import MUTANTS


def test_every_fault_fits_the_source(tmp_path: Path) -> None:
    assert len(MUTANTS) >= 20 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        target = tmp_path / LIBRARY / mutant.file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / LIBRARY / mutant.file, target)
        seed(mutant, tmp_path)
        compile(target.read_text(), mutant.file, "exec")
        assert all((ROOT / test).exists() for test in mutant.tests)


def test_a_fault_is_caught_and_an_unharmful_change_survives() -> None:
    fault = next(mutant for mutant in MUTANTS if mutant.name == "subtree ends a row early")
    assert run(fault).fate == "caught"
    harmless = Mutant(
        "harmless", fault.file, "G groups with C candidates packed", "G groups, C candidates", fault.tests, False
    )
    assert run(harmless).fate == "survived"


def test_a_fault_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).mkdir()
    (tmp_path / LIBRARY / "x.py").write_text("a = 1\na = 1\n")
    with pytest.raises(ValueError, match="stands 2 times"):
        seed(Mutant("twice", "x.py", "a = 1", "a = 2", ()), tmp_path)
