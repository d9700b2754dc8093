"""Tree attention's kernels compile for GPUs with no GPU about: nothing spills, half precision uses tensor cores and
asynchronous copies, shared memory stays within a block's."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest

from tuna_kernels.backends import triton as backend
from tuna_kernels.backends.triton.attention_config import choose
from tuna_kernels.backends.triton.attention_static import STATIC
from tuna_kernels.backends.triton.static import ARCHITECTURES, SHARED_MEMORY, StaticCase, compile_case

needs_compiler = pytest.mark.skipif(
    not backend.INSTALLED or backend.is_interpreted(), reason="needs triton, not interpreting"
)
TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
BY_NAME = {case.name: case for case in STATIC}


@pytest.mark.skipif(not backend.INSTALLED, reason="needs triton")
@pytest.mark.parametrize("case", STATIC, ids=lambda case: case.name)
def test_every_argument_is_told(case: StaticCase) -> None:
    names = list(inspect.signature(case.kernel().fn).parameters)
    told = [*case.signature, *case.constants, *case.configs[80][0].blocks]
    assert sorted(told) == sorted(names)
    assert set(case.configs) == set(ARCHITECTURES)


def check(case: StaticCase, capability: int, folder: Path) -> None:
    import triton

    for config in case.configs[capability]:
        compiled = compile_case(case, config, capability)
        assert compiled.metadata.shared <= SHARED_MEMORY[capability]
        binary = folder / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        ).stdout
        assert re.search(r"STACK:0\b.*LOCAL:0\b", usage), usage
        if case.products:
            assert TENSOR_CORES.get(capability, "mma.sync") in compiled.asm["ptx"]
            assert "cp.async" in compiled.asm["ptx"]


@needs_compiler
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_defaults_on_ampere(kernel: str, tmp_path: Path) -> None:
    check(BY_NAME[f"attention_{kernel} bf16 d64"], 80, tmp_path)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("name", BY_NAME)
def test_defaults_everywhere(name: str, capability: int, tmp_path: Path) -> None:
    check(BY_NAME[name], capability, tmp_path)


def test_each_kind_of_tensor_core_has_its_choice() -> None:
    """Two capabilities of one kind share it; a later card of the wgmma or tcgen05 family too."""
    for kernel in ("forward", "dq", "dkv"):
        for size in (16, 64, 128, 256):
            assert choose(kernel, 80, size, 2) == choose(kernel, 120, size, 2)
            assert choose(kernel, 100, size, 2) == choose(kernel, 103, size, 2)
            assert choose(kernel, 80, size, 4) == choose(kernel, 90, size, 4)
    assert choose("forward", 80, 128, 2) != choose("forward", 90, 128, 2)
