"""The three matrix products of the tile loop, with the operands they convert or pack and use again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .slots import Slots

# A product of fewer rows than this takes other code in the BLAS, which rounds otherwise: such a chunk is padded
# with zero rows, so that a row gives the same bits whatever the number of rows beside it (docs/numerics.md).
MIN_ROWS = 16


class Products(Protocol):
    """``rows`` are places in ``slots.rows``, ``columns`` vocabulary entries; both at most those of the first call."""

    copy: torch.dtype | None
    """The type a tile of the weight is copied to; None where it is used as it is."""

    def logits(self, out: Tensor, source: Tensor, rows: slice, weight: Tensor, columns: slice, *, add: bool) -> None:
        """``out[:n] (+)= source[rows] weight[columns]^T``; ``out`` [max(n, MIN_ROWS), c]."""

    def add_to_rows(self, out: Tensor, gradient: Tensor, weight: Tensor, columns: slice) -> None:
        """``out += gradient weight[columns]``; ``gradient`` [n, c], ``out`` [n, D]."""

    def add_to_weight(self, out: Tensor, gradient: Tensor, source: Tensor, rows: slice, *, beta: float) -> None:
        """``out = beta out + gradient^T source[rows]``; ``out`` [c, D]."""


class ComputeProducts:
    """``torch.mm`` in the compute type, over converted tiles where the sources have another."""

    def __init__(
        self,
        load: Callable[[Tensor, Tensor, Tensor | None], None],
        slots: Slots,
        compute: torch.dtype,
        weight: torch.dtype,
    ) -> None:
        self._load, self._slots, self._compute = load, slots, compute
        self.copy = None if weight == compute else compute
        self._rows: dict[int, tuple[int, Tensor]] = {}  # of a source: first row held, buffer
        self._weights: dict[int, Tensor] = {}

    def logits(self, out: Tensor, source: Tensor, rows: slice, weight: Tensor, columns: slice, *, add: bool) -> None:
        right = self._weight_tile(weight, columns).t()
        if add:
            out.addmm_(self._source_rows(source, rows), right)
        else:
            torch.mm(self._source_rows(source, rows), right, out=out)

    def add_to_rows(self, out: Tensor, gradient: Tensor, weight: Tensor, columns: slice) -> None:
        out.addmm_(gradient, self._weight_tile(weight, columns))

    def add_to_weight(self, out: Tensor, gradient: Tensor, source: Tensor, rows: slice, *, beta: float) -> None:
        out.addmm_(gradient.t(), self._source_rows(source, rows)[: rows.stop - rows.start], beta=beta)

    def _weight_tile(self, source: Tensor, columns: slice) -> Tensor:
        """[c, D] of a weight in the compute type; a view where it is that already."""
        tile = source[columns]
        if tile.dtype == self._compute:
            return tile
        buffer = self._weights.get(id(source))
        if buffer is None:
            buffer = self._weights[id(source)] = torch.empty_like(tile, dtype=self._compute)
        converted = buffer[: tile.shape[0]]
        self._load(converted, tile, None)
        return converted

    def _source_rows(self, source: Tensor, rows: slice) -> Tensor:
        """[max(n, MIN_ROWS), D] hidden states of some rows, zero rows at the end."""
        count = rows.stop - rows.start
        direct = self._slots.contiguous and source.dtype == self._compute and count >= MIN_ROWS
        if direct and source.stride(-1) == 1:
            return source[rows]
        start, buffer = self._rows.get(id(source), (-1, None))
        if buffer is None:
            shape = (max(count, MIN_ROWS), source.shape[1])
            buffer = torch.zeros(shape, dtype=self._compute, device=source.device)
        if start != rows.start:
            self._load(buffer[:count], source, self._slots.rows[rows])
            if count < MIN_ROWS:
                buffer[count:].zero_()
            self._rows[id(source)] = (rows.start, buffer)
        return buffer[: max(count, MIN_ROWS)]
