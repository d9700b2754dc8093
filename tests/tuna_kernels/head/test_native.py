"""The C++ tile operations one by one: conversions exact, exp and tanh within stated errors, threads irrelevant."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tuna_kernels import available_backends, linear_logprobs
from tuna_kernels.head.cpu import NativeTileOps
from tuna_kernels.head.tiled import LinearHead, RowGradient, SoftmaxState, Tile

pytestmark = pytest.mark.skipif(bool(available_backends()["cpu"]), reason=available_backends()["cpu"])
OPS = NativeTileOps()
NO_TARGETS = torch.empty(0, dtype=torch.int64)


def one_row(values: Tensor) -> Tile:
    return Tile(values.view(1, -1), 0, None, torch.zeros(2, dtype=torch.int64), NO_TARGETS)


def native_exp(x: Tensor) -> Tensor:
    """The gradient of a row with maximum 0, log of the sum 0 and softmax weight 1 is e^x."""
    out = x.clone()
    rows = RowGradient(torch.zeros(1), torch.zeros(1), torch.ones(1), None, None, torch.empty(0))
    OPS.gradient(one_row(out), LinearHead(torch.empty(0, 0), None, None, 1.0, None), rows, is_capped=False)
    return out


def native_tanh(x: Tensor) -> Tensor:
    """A cap of 1 leaves tanh(x) in the tile."""
    out = x.clone()
    state = SoftmaxState(torch.full((1,), -torch.inf), torch.zeros(1, dtype=torch.float64), None, None, torch.empty(0))
    OPS.softmax(one_row(out), LinearHead(torch.empty(0, 0), None, None, 1.0, 1.0), state)
    return out


def test_exp_is_within_a_unit_in_the_last_place() -> None:
    x = torch.linspace(-87.3, 88.0, 1_000_001)
    truth = x.double().exp()
    relative = ((native_exp(x).double() - truth) / truth).abs().max().item()
    assert relative <= torch.finfo(torch.float32).eps


MEASURE = """
#include <cmath>
#include <cstdio>
#include "common/vector_math.h"
int main() {
  double exp_error = 0, tanh_error = 0;
  for (int i = 0; i <= 1000000; i++) {
    const float x = -87.3f + i * 1.753e-4f, y = -10.f + i * 2e-5f;
    exp_error = std::fmax(exp_error, std::fabs(tuna::exp_of(x) / std::exp(double(x)) - 1));
    if (y != 0) tanh_error = std::fmax(tanh_error, std::fabs(tuna::tanh_of(y) / std::tanh(double(y)) - 1));
  }
  std::printf("%.9g %.9g", exp_error, tanh_error);
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("fused", ["off", "fast"])
def test_exp_and_tanh_hold_with_and_without_fused_multiply_add(fused: str, tmp_path: Path) -> None:
    """x86-64 before AVX2 has none, other processors do: compiled here both ways, for this processor."""
    program = tmp_path / "measure"
    (tmp_path / "measure.cpp").write_text(MEASURE)
    command = ["c++", "-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", f"-ffp-contract={fused}"]
    if fused == "fast":
        command += ["-march=native"]
    where = Path(__file__).parents[3] / "csrc" / "cpu"
    subprocess.run([*command, f"-I{where}", str(tmp_path / "measure.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    exp_error, tanh_error = map(float, done.stdout.split())
    eps = torch.finfo(torch.float32).eps
    assert exp_error <= eps and tanh_error <= 4 * eps


def test_exp_at_the_edges() -> None:
    x = torch.tensor([0.0, -0.0, -88.0, -1e30, -torch.inf, torch.nan])
    out = native_exp(x)
    assert out[:2].tolist() == [1.0, 1.0] and out[2:5].tolist() == [0.0, 0.0, 0.0] and out[5].isnan()


def test_tanh_is_within_four_units_in_the_last_place() -> None:
    x = torch.cat([torch.linspace(-12, 12, 1_000_001), torch.logspace(-30, 0, 2001), torch.tensor([1e30, -1e30])])
    truth = x.double().tanh()
    relative = ((native_tanh(x).double() - truth) / truth.where(truth != 0, 1)).abs().max().item()
    assert relative <= 4 * torch.finfo(torch.float32).eps
    assert native_tanh(torch.tensor([torch.nan])).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_pattern_converts_exactly(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(256, 256)
    source = patterns.view(dtype)
    out = torch.empty(256, 256)
    OPS.load(out, source, None)
    assert torch.equal(out.nan_to_num(nan=7.0), source.float().nan_to_num(nan=7.0))
    index = torch.tensor([5, 5, 255, 0])
    OPS.load(out[:4], source, index)
    assert torch.equal(out[:4].nan_to_num(nan=7.0), source[index].float().nan_to_num(nan=7.0))


def test_the_number_of_threads_changes_no_bit_of_the_tile_operations() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5000, generator=g) * 10
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tile = Tile(logits.clone(), 0, None, torch.arange(65), torch.arange(64))
        state = SoftmaxState(
            torch.full((64,), -torch.inf),
            torch.zeros(64, dtype=torch.float64),
            torch.zeros(64, dtype=torch.float64),
            None,
            torch.zeros(64),
        )
        OPS.softmax(tile, LinearHead(logits, None, None, 0.9, 20.0), state)
        results.append((*(t for t in state if t is not None), tile.logits))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_threads_than_rows() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        out = linear_logprobs(torch.zeros(1, 2), torch.zeros(5, 2), torch.tensor([4]), backend="cpu")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, torch.tensor([5.0]).log().neg())
