"""Vocabulary-parallel heads over the Triton kernels."""

from __future__ import annotations

import pytest

from tests.triton.device import DEVICE
from tests.tuna_kernels.head.test_parallel import check_ranks


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo ranks with CPU tensors: in the interpreter")
def test_two_ranks_equal_one() -> None:
    check_ranks("triton")
