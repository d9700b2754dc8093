"""Whose products the `cpu` backend takes: timed once, remembered for the processor, the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tuna_kernels import linear_logprobs, show_config
from tuna_kernels.head import cpu, product_choice
from tuna_kernels.head.product_choice import BLAS, OWN, VARIABLE, Choice, Run, choose

needs_products = pytest.mark.skipif(
    bool(cpu.WHY_NOT_HERE) or not cpu.native().has_products(cpu.instruction_set()), reason="no products of our own"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    product_choice.forget()
    yield tmp_path / "tuna_kernels"
    product_choice.forget()


class Clock:
    """Stands for the products: one that takes so many milliseconds, and counts what is timed."""

    def __init__(self) -> None:
        self.timed = 0

    def takes(self, milliseconds: float) -> Callable[[], Run]:
        def prepare() -> Run:
            self.timed += 1
            return lambda: time.sleep(milliseconds / 1000)

        return prepare

    def choose(self, own: float, blas: float, dtype: torch.dtype = torch.float32, isa: str = "avx512") -> Choice:
        return choose(dtype, isa, self.takes(own), self.takes(blas))


def test_the_quicker_is_taken_and_remembered_by_type_set_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    first = clock.choose(own=9, blas=1)
    assert first.way == BLAS and first.blas_ms is not None and first.blas_ms < 9 and "timed once" in first.reason
    product_choice.forget()  # another process, on which the times come out the other way
    assert clock.choose(own=1, blas=9) == first and clock.timed == 2
    assert clock.choose(own=1, blas=9, dtype=torch.bfloat16).way == OWN
    assert clock.choose(own=1, blas=9, isa="avx2").way == OWN
    monkeypatch.setattr(product_choice, "_processor", lambda: "another, with the same home directory")
    assert clock.choose(own=1, blas=9).way == OWN and clock.timed == 8
    monkeypatch.undo()


def test_ours_stay_where_the_blas_is_not_clearly_quicker() -> None:
    assert Clock().choose(own=3, blas=2.9).way == OWN


def test_the_environment_decides_without_timing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    clock = Clock()
    for way in (OWN, BLAS):
        monkeypatch.setenv(VARIABLE, way)
        assert clock.choose(own=1, blas=9) == Choice(way, f"{VARIABLE} asks for it")
    monkeypatch.setenv(VARIABLE, "mkl")
    with pytest.raises(ValueError, match=f"{VARIABLE} = 'mkl' is not one of"):
        clock.choose(own=1, blas=9)
    assert clock.timed == 0 and not cache.exists()


def test_without_a_place_to_remember_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice made anew by every process would change bits from run to run. A file stands where a folder should."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    clock = Clock()
    choice = clock.choose(own=9, blas=1)
    assert choice.way == OWN and "is not writable" in choice.reason and clock.timed == 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"way": "blas"}',
        "\udcff",
        '{"key": "another", "way": "own", "own_ms": 1.0, "blas_ms": 2.0}',
    ],
)
def test_what_is_no_choice_is_replaced(content: str, cache: Path) -> None:
    clock = Clock()
    clock.choose(own=1, blas=9)
    (file,) = cache.iterdir()
    good = json.loads(file.read_text())
    file.write_bytes(content.encode(errors="surrogateescape"))
    product_choice.forget()
    assert clock.choose(own=9, blas=1).way == BLAS and clock.timed == 4
    assert json.loads(file.read_text()) | {"way": OWN} == good | {
        name: json.loads(file.read_text())[name] for name in ("own_ms", "blas_ms")
    }
    assert list(cache.iterdir()) == [file]


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    """Each finds another winner, and whoever is remembered first decides for all."""
    program = (
        "import sys, time, torch\n"
        "from tuna_kernels.head.product_choice import choose\n"
        "takes = lambda ms: lambda: lambda: time.sleep(ms / 1000)\n"
        "own, blas = (1, 9) if sys.argv[1] == '0' else (9, 1)\n"
        "print(choose(torch.float32, 'avx2', takes(own), takes(blas)).way)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(i % 2)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for i in range(4)
    ]
    assert len({process.communicate()[0] for process in started}) == 1
    assert all(process.returncode == 0 for process in started)


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_takes_the_products_that_were_chosen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really timed here, under a default device and fake tensors that are the caller's business; then both ways."""
    with torch.device("meta"), torch.no_grad():
        chosen = cpu.products_chosen()
    assert all("timed once" in whose for whose in chosen.values())
    assert all(f"{name} products: {whose}" in show_config() for name, whose in chosen.items())
    calls: list[str] = []
    multiply = cpu._NativeMultiply.__call__

    def listening(self: object, *args: object, **keywords: object) -> None:
        calls.append("own")
        multiply(self, *args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu._NativeMultiply, "__call__", listening)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 24, generator=g).to(dtype), torch.randn(50, 24, generator=g).to(dtype)
    exact = torch.log_softmax(hidden.double() @ weight.double().t(), -1)[:, 3]
    for way in (OWN, BLAS):
        monkeypatch.setenv(VARIABLE, way)
        calls.clear()
        found = linear_logprobs(hidden, weight, torch.full((20,), 3), backend="cpu")
        assert bool(calls) == (way == OWN)
        assert (found - exact).abs().max() < 1e-5  # type: ignore[union-attr,operator]
        assert cpu.has_products(dtype) == (way == OWN) and not (way == BLAS and cpu.multiplies(dtype))
