"""What tree attention's kernels tell the static check (`tests/benchmarks/test_gpu_static.py` compiles them)."""

from __future__ import annotations

import inspect

import pytest

from tuna_kernels.attention.triton.config import candidates
from tuna_kernels.attention.triton.static import STATIC
from tuna_kernels.gpu import availability as backend
from tuna_kernels.gpu.static_case import ARCHITECTURES, StaticCase


@pytest.mark.skipif(not backend.INSTALLED, reason="needs triton")
@pytest.mark.parametrize("case", STATIC, ids=lambda case: case.name)
def test_every_argument_is_told(case: StaticCase) -> None:
    names = list(inspect.signature(case.kernel().fn).parameters)
    told = [*case.signature, *case.constants, *case.configs[80][0].blocks]
    assert sorted(told) == sorted(names)
    assert set(case.configs) == set(ARCHITECTURES)


def test_each_kind_of_tensor_core_has_its_choice() -> None:
    """Two capabilities of one kind share it; a later card of the wgmma or tcgen05 family too."""
    for kernel in ("forward", "dq", "dkv"):
        for size in (16, 64, 128, 256):
            assert candidates(kernel, 80, size, "half") == candidates(kernel, 120, size, "half")
            assert candidates(kernel, 100, size, "half") == candidates(kernel, 103, size, "half")
            assert candidates(kernel, 80, size, "ieee") == candidates(kernel, 90, size, "ieee")
    assert candidates("forward", 80, 128, "half") != candidates("forward", 90, 128, "half")
    assert candidates("dq", 89, 128, "half", softcap=True) != candidates("dq", 89, 128, "half")
