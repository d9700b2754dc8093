"""Launch configurations of tree attention. Placeholder values are replaced below."""
from __future__ import annotations

from tuna_kernels.backends.triton.static import Config


def choose(kernel: str, capability: int, size: int, itemsize: int) -> Config:
    return Config({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2)
