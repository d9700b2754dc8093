"""The memory meters: a known allocation is seen, what was there before is not, temporaries count."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tuna.compare.memory_meter import ResidentPeak, allocator_peak, in_fresh_process
from tuna_kernels import linear_logprobs
from tuna_kernels.dispatch import available_backends

MIB = 2**20


def test_allocator_peak_sees_temporaries_and_results_but_not_inputs() -> None:
    held = torch.ones(MIB)  # 4 MiB

    def work() -> torch.Tensor:
        temporary = held + 1  # 4 MiB, freed before the result is made
        total = temporary.sum()
        del temporary
        return torch.ones(3 * MIB // 4) * total  # 3 + 3 MiB at once

    assert allocator_peak(work) == pytest.approx(6 * MIB, rel=0.05)


def test_allocator_peak_counts_memory_that_comes_back_only_once() -> None:
    def work() -> None:
        for _ in range(5):
            torch.ones(2 * MIB, dtype=torch.uint8)

    assert allocator_peak(work) == pytest.approx(2 * MIB, rel=0.05)


def test_freeing_what_was_there_before_does_not_hide_what_comes() -> None:
    held = [torch.ones(8 * MIB, dtype=torch.uint8)]

    def work() -> torch.Tensor:
        held.clear()
        return torch.ones(2 * MIB, dtype=torch.uint8)

    assert allocator_peak(work) == pytest.approx(2 * MIB, rel=0.05)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_allocator_peak_sees_the_buffers_of_our_kernels(backend: str) -> None:
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(5000, 32, requires_grad=True)
    targets = torch.randint(5000, (64,))

    def work() -> tuple[torch.Tensor, ...]:
        logprobs = linear_logprobs(hidden, weight, targets, backend=backend)
        return torch.autograd.grad(logprobs, [hidden, weight], torch.ones_like(logprobs))

    results = 4 * (hidden.numel() + weight.numel())
    assert results <= allocator_peak(work)


def test_resident_peak_of_a_fresh_process_sees_a_known_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    peak = ResidentPeak(*in_fresh_process("fresh_targets:touch", {"mebibytes": 100}, threads=1))
    assert peak.growth == pytest.approx(100 * MIB, rel=0.05)
    assert peak.process > peak.growth


def test_a_fresh_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(RuntimeError, match="this target always fails"):
        in_fresh_process("fresh_targets:fail", {}, threads=1)


def test_a_fresh_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    call = f"in_fresh_process('fresh_targets:linger', {{'file': {str(file)!r}}}, threads=1)"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", f"from tuna.compare.memory_meter import in_fresh_process; {call}"]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}) as parent:
        _until(lambda: file.exists() and file.read_text() != "")
        parent.kill()
    child = int(file.read_text())
    _until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def _until(reached: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.1)
