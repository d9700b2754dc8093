"""Head kernels compile without a GPU, and what the compiler made of them is what was meant.

A sample that is quick; `make gpu-static` does every kernel, configuration and architecture.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tuna_kernels.backends import triton as backend
from tuna_kernels.backends.triton.static import ARCHITECTURES, SHARED_MEMORY, StaticCase, compile_case

if not backend.INSTALLED or backend.is_interpreted():
    pytest.skip("compiles with triton, not under its interpreter", allow_module_level=True)

FILES = ("forward", "gradient", "logits", "unit")
CASES: dict[str, StaticCase] = {
    case.name: case for f in FILES for case in importlib.import_module(f"tuna_kernels.backends.triton.{f}").STATIC
}


def spilled(compiled: Any) -> int:
    """Bytes a thread spills, by the driver's own dump of the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(text.stdout.split("STACK:")[1].split()[0])


def test_every_case_has_a_choice_for_every_architecture() -> None:
    assert len(CASES) > 20
    for case in CASES.values():
        assert set(case.configs) == set(ARCHITECTURES) and all(case.configs.values()), case.name


@pytest.mark.parametrize(
    "name,capability,instruction",
    [
        ("head_forward bf16", 80, "mma.sync"),
        ("head_forward bf16", 90, "wgmma.mma"),
        ("head_forward bf16", 100, "tcgen05.mma"),
        ("head_gradient bf16", 86, "mma.sync"),
        ("head_gradient bf16", 90, "wgmma.mma"),
        ("head_gradient entropy filter bf16 bias lora softcap", 89, "mma.sync"),
    ],
)
def test_default_configurations(
    name: str, capability: int, instruction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path)))
    case = CASES[name]
    compiled = compile_case(case, case.configs[capability][0], capability)
    ptx = compiled.asm["ptx"]
    assert case.products and instruction in ptx
    assert "cp.async" in ptx, "tiles are fetched while others are multiplied"
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    assert spilled(compiled) == 0
    assert not re.search(r"^\s*call", ptx, re.MULTILINE), "no function of a library"
