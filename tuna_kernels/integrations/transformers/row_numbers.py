"""Detects models that count the rows of their input instead of using `position_ids`, the depths in a packed tree.

A small tree reveals most cases numerically. A model that uses row numbers only beyond some length (Llama 4
scales its queries from row 8192 on) computes any small tree correctly. So `RowNumbers` traces what is derived from
`torch.arange` over the rows (or from a running sum of ones) while the backbone runs, and records where it is used as a
value instead of an index.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_ours: ContextVar[bool] = ContextVar("tuna_tree_ours", default=False)

_INDEXING = frozenset(
    {
        *("__getitem__", "__setitem__", "index_select", "gather", "take", "take_along_dim", "index_add", "index_add_"),
        *("index_put", "index_put_", "index_copy", "index_copy_", "scatter", "scatter_", "scatter_add"),
        *("scatter_add_", "scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_"),
    }
)
"""Operations that use a row number as an index, as experts do to find their tokens."""


@contextmanager
def ours() -> Iterator[None]:
    """Context of our own code, which may count rows."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


class RowNumbers(TorchFunctionMode):
    """Records in `found` the layers that compute with the numbers 0 … rows - 1 (class and operation).

    Args:
        rows: number of rows of the input.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.found: set[tuple[str, str]] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if _ours.get() or not isinstance(out, Tensor):
            return out
        name = getattr(func, "__name__", str(func))
        if name in ("arange", "cumsum", "linspace"):
            if self._counts_rows(out):
                self._numbers[out] = True
        elif self._has_numbers([*args, *(kwargs or {}).values()]):
            if not out.is_floating_point():
                self._numbers[out] = True
            elif name not in _INDEXING:
                self.found.add((_layer(), name))
        return out

    def _counts_rows(self, out: Tensor) -> bool:
        """Whether `out` counts the rows, from 0 or from 1."""
        if out.numel() != self._rows:
            return False
        from_zero = out.flatten() - out.flatten()[0]
        return bool((from_zero == torch.arange(self._rows, device=out.device)).all())

    def _has_numbers(self, values: Iterable[Any]) -> bool:
        return any(isinstance(value, Tensor) and value in self._numbers for value in values)


def _layer() -> str:
    """The class of the module whose forward is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            return type(module).__name__
        frame = frame.f_back
    return "a function of the model"


def corrected(module: nn.Module, query: Tensor, depth: Tensor, query_rows: Tensor | None) -> Tensor:
    """The queries [B, Hq, Tq, d] rescaled as if the layer had scaled them by depth instead of by row.

    Llama 4's layers without rotary positions multiply a query by a temperature that grows with its position, which
    they count in rows.
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    with ours():
        rows = torch.arange(query.shape[2], device=query.device)
        depth = (depth if query_rows is None else depth[query_rows]).to(query.device)
        ratio = _temperature(module, depth) / _temperature(module, rows)
        scaled: Tensor = query * ratio[:, None]
        return scaled.to(query.dtype)


def _temperature(module: Any, positions: Tensor) -> Tensor:
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
    temperature: Tensor = torch.log1p(steps) * module.attn_scale + 1.0
    return temperature


CORRECTED = frozenset({"Llama4TextAttention", "BloomModel", "MptModel"})
"""Modules that count rows, which `corrected` or `dense_mask` corrects."""
