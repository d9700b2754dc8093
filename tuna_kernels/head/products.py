"""The three matrix products of the tile loop, with their converted and reused operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tuna_kernels.head.slots import Slots

# For fewer rows than this the BLAS uses other code, with different rounding: such a chunk is padded with zero
# rows, so that a row's bits do not depend on the number of other rows (docs/numerics.md).
MIN_ROWS = 16


class Multiply(Protocol):
    """How a backend multiplies matrices with the dtypes of a call."""

    rows: torch.dtype
    """The required dtype of hidden rows."""
    converts: bool
    """Whether it accepts a weight of another dtype than the compute type."""

    def __call__(self, out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
        """`out = left right`, or added to it; `out` [m, n], operands may be transposed views."""


class TorchMultiply:
    """`Multiply` by torch, everything in one dtype."""

    converts = False

    def __init__(self, compute: torch.dtype) -> None:
        self.rows = compute

    def __call__(self, out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
        if add:
            out.addmm_(left, right)
        else:
            torch.mm(left, right, out=out)


class Products:
    """The products of a call. `rows` index `slots.rows`, `columns` the vocabulary; neither may be larger than in the
    first call."""

    def __init__(
        self,
        multiply: Multiply,
        load: Callable[[Tensor, Tensor, Tensor | None], None],
        slots: Slots,
        compute: torch.dtype,
    ) -> None:
        self._multiply, self._load, self._slots, self._compute = multiply, load, slots, compute
        self._rows: dict[int, tuple[int, Tensor]] = {}  # of a source: first row held, buffer
        self._weights: dict[int, Tensor] = {}

    def logits(self, out: Tensor, source: Tensor, rows: slice, weight: Tensor, columns: slice, *, add: bool) -> None:
        """`out (+)= source[rows] weight[columns]^T`; `out` [max(n, MIN_ROWS), c]."""
        self._multiply(out, self._source_rows(source, rows), self._weight_tile(weight, columns).t(), add=add)

    def add_to_rows(self, out: Tensor, gradient: Tensor, weight: Tensor, columns: slice) -> None:
        """`out += gradient weight[columns]`; `gradient` [n, c], `out` [n, D]."""
        self._multiply(out, gradient, self._weight_tile(weight, columns), add=True)

    def to_weight(self, out: Tensor, gradient: Tensor, source: Tensor, rows: slice, *, add: bool) -> None:
        """`out (+)= gradient^T source[rows]`; `out` [c, D]."""
        self._multiply(out, gradient.t(), self._source_rows(source, rows)[: rows.stop - rows.start], add=add)

    def _weight_tile(self, source: Tensor, columns: slice) -> Tensor:
        """[c, D] of a weight, in the compute type unless products convert it; a view if possible."""
        tile = source[columns]
        if self._multiply.converts or tile.dtype == self._compute:
            return tile
        buffer = self._weights.get(id(source))
        if buffer is None:
            buffer = self._weights[id(source)] = torch.empty_like(tile, dtype=self._compute)
        converted = buffer[: tile.shape[0]]
        self._load(converted, tile, None)
        return converted

    def _source_rows(self, source: Tensor, rows: slice) -> Tensor:
        """[max(n, MIN_ROWS), D] hidden states of some rows, zero rows at the end."""
        count, dtype = rows.stop - rows.start, self._multiply.rows
        if self._slots.contiguous and source.dtype == dtype and count >= MIN_ROWS:
            return source[rows]
        start, buffer = self._rows.get(id(source), (-1, None))
        if buffer is None:
            shape = (max(count, MIN_ROWS), source.shape[1])
            buffer = torch.zeros(shape, dtype=dtype, device=source.device)
        if start != rows.start:
            self._load(buffer[:count], source, self._slots.rows[rows])
            if count < MIN_ROWS:
                buffer[count:].zero_()
            self._rows[id(source)] = (rows.start, buffer)
        return buffer[: max(count, MIN_ROWS)]
