"""Where the kernels run in these tests."""

from __future__ import annotations

from tuna_kernels.gpu.availability import is_interpreted

DEVICE = "cpu" if is_interpreted() else "cuda"
