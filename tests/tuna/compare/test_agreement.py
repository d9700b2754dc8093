"""Laws of `measure_errors`: relative to the oracle, and one bad tensor is never hidden by good ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuna.compare.agreement import measure_errors


@given(st.floats(0, 3), st.floats(-5, 5))
def test_errors_scale_with_the_oracle(relative: float, exponent: float) -> None:
    """max_rel and norm_rel of o * (1 + e) are e whatever the size of o; max_abs is e * max|o|."""
    right = torch.tensor([[3.0, -4.0], [0.5, 0.0]], dtype=torch.float64) * 10**exponent
    error = measure_errors({"a": right * (1 + relative)}, {"a": right})["a"]
    assert error.max_rel == pytest.approx(relative, abs=1e-14)
    assert error.norm_rel == pytest.approx(relative, abs=1e-14)
    assert error.max_abs == pytest.approx(relative * 4 * 10**exponent, abs=1e-13 * 10**exponent)


def test_one_bad_tensor_is_not_hidden_by_good_ones_of_its_kind() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    names = ["gradient:a", "gradient:b", "gradient:c"]
    oracle = dict.fromkeys(names, ones)
    bad = measure_errors({**oracle, "gradient:b": ones * float("nan")}, oracle)["gradient"]
    assert (bad.max_rel, bad.max_abs, bad.worst) == (None, None, "gradient:b")
    off = measure_errors({**oracle, "gradient:b": ones * 1.5}, oracle)["gradient"]
    assert (off.max_rel, off.worst) == (0.5, "gradient:b")
    assert off.norm_rel == pytest.approx((0.25 / 3) ** 0.5)


def test_a_gradient_that_should_be_zero_and_is_not_counts_as_infinitely_wrong() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert measure_errors({"a": zero}, {"a": zero})["a"].max_rel == 0
    assert measure_errors({"a": zero + 1e-9}, {"a": zero})["a"].max_rel is None
