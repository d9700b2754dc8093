"""The native extension (csrc/cpu): whether it is here, what it takes, which copy of it runs.

Addresses, strides and a thread count cross the border; the extension knows nothing of torch. It stands in a folder of
its own, since an editable install lends modules right below `tuna_kernels` to any other copy of the package.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tuna_kernels.installation import why_no_extension

_cpu: Any = None
try:
    _cpu = import_module("tuna_kernels.native._cpu")
    WHY_NOT_HERE = ""
except ImportError as error:
    WHY_NOT_HERE = why_no_extension(error)

ISA_VARIABLE = "TUNA_KERNELS_CPU_ISA"
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How csrc/cpu/common/element.h numbers the types it takes."""


def why_not(*dtypes: torch.dtype) -> str:
    """ "" if the native code takes these types, else the reason why not."""
    if WHY_NOT_HERE:
        return WHY_NOT_HERE
    bad = [str(d) for d in dtypes if d not in ELEMENTS]
    return f"it computes in float32 and does not take {', '.join(bad)}" if bad else ""


def instruction_set() -> Any:
    """Which copy of the native code runs: the best for this processor, or a lesser one that the environment asks for.

    Raises:
        ValueError: TUNA_KERNELS_CPU_ISA is no instruction set.
    """
    best, sets = _cpu.best_instruction_set(), _cpu.InstructionSet.__members__
    asked = os.environ.get(ISA_VARIABLE, best.name)
    if asked not in sets:
        raise ValueError(f"{ISA_VARIABLE} = {asked!r} is not one of {tuple(sets)}")
    return min(best, sets[asked], key=int)


def native() -> Any:
    """The extension. Only for types for which `why_not` gives no reason."""
    return _cpu


def address(tensor: Tensor | None) -> int:
    """Of the first element, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
