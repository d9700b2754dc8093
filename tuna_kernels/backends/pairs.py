"""Products of bfloat16 operands with float32 sums, on processors that multiply bfloat16 (csrc/cpu/pairs.h).

Gradients of logits are rounded to bfloat16 before they are multiplied, as on a GPU; logits are not rounded at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .products import Products
from .slots import Slots


class PairProducts(Products):
    """See :class:`tuna_kernels.backends.products.Products`.

    Packed operands are kept until another part of the same source is asked for: those of the weight serve all chunks
    of rows, those of the hidden states, where one chunk holds all, every tile.
    """

    copy = torch.bfloat16

    def __init__(self, native: Any, source: Callable[[Tensor, Tensor | None], Any], slots: Slots) -> None:
        self._native, self._source, self._slots = native, source, slots
        self._packed: dict[tuple[int, str], tuple[int, Tensor]] = {}  # (operand, layout): first line held, buffer
        self._gradient: Tensor | None = None

    def logits(self, out: Tensor, source: Tensor, rows: slice, weight: Tensor, columns: slice, *, add: bool) -> None:
        left = self._kept(source, rows, "lines", self._slots.rows[rows])
        right = self._kept(weight, columns, "along")
        self._multiply(out[: rows.stop - rows.start], left, right, source.shape[1], add=add)

    def add_to_rows(self, out: Tensor, gradient: Tensor, weight: Tensor, columns: slice) -> None:
        left = self._pack(gradient, "lines", self._gradient_buffer(gradient))
        self._multiply(out, left, self._kept(weight, columns, "across"), gradient.shape[1], add=True)

    def add_to_weight(self, out: Tensor, gradient: Tensor, source: Tensor, rows: slice, *, beta: float) -> None:
        left = self._pack(gradient, "gradient", self._gradient_buffer(gradient))
        right = self._kept(source, rows, "across", self._slots.rows[rows])
        self._multiply(out, left, right, gradient.shape[0], add=beta != 0, left_in_panels=True)

    def _kept(self, source: Tensor, part: slice, layout: str, index: Tensor | None = None) -> Tensor:
        """Rows ``part`` of a source (those in ``index``, where given), packed."""
        key = (id(source), layout)
        start, buffer = self._packed.get(key, (-1, None))
        if buffer is None or start != part.start:
            lines = source[part] if index is None else source
            if buffer is None:
                buffer = torch.empty(self._pairs(layout, part.stop - part.start, source.shape[1]), dtype=torch.int32)
            self._pack(lines, layout, buffer, index)
            self._packed[key] = (part.start, buffer)
        return buffer

    def _gradient_buffer(self, gradient: Tensor) -> Tensor:
        if self._gradient is None:
            size = max(self._pairs(layout, *gradient.shape) for layout in ("lines", "gradient"))
            self._gradient = torch.empty(size, dtype=torch.int32)
        return self._gradient

    def _pairs(self, layout: str, rows: int, columns: int) -> int:
        """How many pairs a layout of a source [rows, columns] takes."""
        if layout == "lines":
            return rows * _up(columns, 2)
        width = self._panel(layout)
        lines, inner = (rows, columns) if layout == "along" else (columns, rows)
        return _up(lines, width) * width * _up(inner, 2)

    def _panel(self, layout: str) -> int:
        width: int = self._native.LEFT_PANEL if layout == "gradient" else self._native.RIGHT_PANEL
        return width

    def _pack(self, source: Tensor, layout: str, out: Tensor, index: Tensor | None = None) -> Tensor:
        described, threads = self._source(source, index), torch.get_num_threads()
        if layout == "lines":
            self._native.pack_lines(out.data_ptr(), described, threads=threads)
        elif layout == "along":
            self._native.pack_panels_along(out.data_ptr(), described, threads=threads)
        else:
            self._native.pack_panels_across(out.data_ptr(), described, width=self._panel(layout), threads=threads)
        return out

    def _multiply(
        self, out: Tensor, left: Tensor, right: Tensor, inner: int, *, add: bool, left_in_panels: bool = False
    ) -> None:
        self._native.multiply_pairs(
            c=out.data_ptr(),
            stride=out.stride(0),
            rows=out.shape[0],
            columns=out.shape[1],
            left=left.data_ptr(),
            left_in_panels=left_in_panels,
            right=right.data_ptr(),
            pairs=_up(inner, 2),
            add=add,
            threads=torch.get_num_threads(),
        )


def _up(value: int, step: int) -> int:
    """How many steps hold the value."""
    return -(-value // step)
