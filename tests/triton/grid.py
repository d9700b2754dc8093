"""The order in which the interpreter runs the programs of a grid. A GPU promises none; the interpreter goes upwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ORDERS = ("ascending", "descending")


def kernel_name(module: str, function: str) -> str:
    """``head.forward.forward_kernel`` for a function of ``tuna_kernels.head.triton.forward``."""
    return ".".join([*module.split(".")[1::2], function])


@contextmanager
def programs_run(order: str) -> Iterator[dict[str, int]]:
    """Every launch within runs its programs in this order; gives kernel -> programs of its largest launch so far."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_size, set_place, launch = builder.set_grid_dim, builder.set_grid_idx, interpreter.GridExecutor.__call__
    size = [0, 0, 0]
    launched: dict[str, int] = {}
    running = [""]

    def remember(*grid: int) -> None:
        size[:] = grid
        launched[running[0]] = max(launched.get(running[0], 0), math.prod(grid))
        set_size(*grid)

    def place(*index: int) -> None:
        set_place(*(n - 1 - i for n, i in zip(size, index, strict=True)) if order == "descending" else index)

    def named(executor: Any, *args: Any, **kwargs: Any) -> None:
        running[0] = kernel_name(executor.fn.__module__, executor.fn.__name__)
        launch(executor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_dim", remember)
        patch.setattr(builder, "set_grid_idx", place)
        patch.setattr(interpreter.GridExecutor, "__call__", named)
        yield launched
