"""Argument handling shared by all ops."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def should_validate(validate: bool | None, tensor: Tensor) -> bool:
    """Whether to check values: never inside a compiled graph or on fake tensors."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return tensor.device.type == "cpu" if validate is None else validate


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself if its last axis is contiguous in memory, else a contiguous copy."""
    return x if x.ndim == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@functools.cache
def named_arguments(overload: OpOverload[..., Any]) -> Any:
    """The named tuple type of an op's arguments, with the op's defaults."""
    arguments = overload._schema.arguments
    defaults = [argument.default_value for argument in arguments if argument.has_default_value()]
    return namedtuple(overload._opname, [argument.name for argument in arguments], defaults=defaults)


def register_fake(op: CustomOpDef) -> Callable[[Callable[[Any], Any]], None]:
    """Register the decorated function, which takes the op's arguments as a named tuple, as its fake implementation."""
    named = named_arguments(op._opoverload)

    def register(function: Callable[[Any], Any]) -> None:
        op.register_fake(lambda *given: function(named(*given)))

    return register
