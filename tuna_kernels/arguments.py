"""What every op does with its arguments before it computes."""

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
    """Whether to look at values: never inside a compiled graph, nor where a fake tensor has none."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return tensor.device.type == "cpu" if validate is None else validate


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself if the entries of its last axis are neighbours in memory, else a copy in which they are."""
    return x if x.ndim == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@functools.cache
def named_arguments(overload: OpOverload[..., Any]) -> Any:
    """The named tuple of an op's arguments, for the positional ones it is called with: the rest has its defaults."""
    arguments = overload._schema.arguments
    defaults = [argument.default_value for argument in arguments if argument.has_default_value()]
    return namedtuple(overload._opname, [argument.name for argument in arguments], defaults=defaults)


def register_fake(op: CustomOpDef) -> Callable[[Callable[[Any], Any]], None]:
    """Register the decorated function of the op's arguments, one named tuple, as its fake implementation."""
    named = named_arguments(op._opoverload)

    def register(function: Callable[[Any], Any]) -> None:
        op.register_fake(lambda *given: function(named(*given)))

    return register
