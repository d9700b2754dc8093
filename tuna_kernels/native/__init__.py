"""The native extension (csrc/cpu): whether it is installed, which dtypes it supports, which instruction set it uses.

The interface is addresses, strides and a thread count; the extension does not depend on torch. It has its own folder
because an editable install makes modules directly below `tuna_kernels` visible to any other copy of the package.
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
"""The type numbers of csrc/cpu/common/element.h."""


def why_not(*dtypes: torch.dtype) -> str:
    """ "" if the native code supports these dtypes, else the reason why not."""
    if WHY_NOT_HERE:
        return WHY_NOT_HERE
    bad = [str(d) for d in dtypes if d not in ELEMENTS]
    return f"it computes in float32 and does not support {', '.join(bad)}" if bad else ""


def instruction_set() -> Any:
    """The instruction set used: the best one of this processor, or a lower one set in the environment.

    Raises:
        ValueError: TUNA_KERNELS_CPU_ISA is not a known instruction set.
    """
    best, sets = _cpu.best_instruction_set(), _cpu.InstructionSet.__members__
    asked = os.environ.get(ISA_VARIABLE, best.name)
    if asked not in sets:
        raise ValueError(f"{ISA_VARIABLE} = {asked!r} is not one of {tuple(sets)}")
    return min(best, sets[asked], key=int)


def native() -> Any:
    """The extension module. Use it only for dtypes that `why_not` accepts."""
    return _cpu


def address(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
