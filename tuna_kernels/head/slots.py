"""Slots grouped by hidden row: a row with several slots is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """The counted slots, sorted by hidden row (compressed sparse rows).

    Attributes:
        rows: [R] the distinct hidden rows with a counted slot, ascending.
        offsets: [R+1] row r has the sorted slots `offsets[r]:offsets[r+1]`.
        slots: [S] index of each sorted slot among the caller's M slots.
        targets: [S] its target token.
        row_of: [S] its index into `rows`.
        contiguous: whether `rows` is `0 … R-1`, so that hidden states need no gather.
    """

    rows: Tensor
    offsets: Tensor
    slots: Tensor
    targets: Tensor
    row_of: Tensor
    contiguous: bool

    @classmethod
    def build(cls, targets: Tensor, rows: Tensor | None, ignore_index: int) -> Slots:
        """Drop ignored slots of `targets` [M] and group the rest by `rows` [M] (None: slot m uses row m)."""
        slots = (targets != ignore_index).nonzero().squeeze(1)
        if rows is None:
            counts = torch.ones_like(slots)
            distinct = slots
        else:
            used, order = torch.sort(rows[slots], stable=True)
            slots = slots[order]
            distinct, counts = torch.unique_consecutive(used, return_counts=True)
        return cls._from_counts(distinct, counts, slots, targets[slots])

    @classmethod
    def _from_counts(cls, rows: Tensor, counts: Tensor, slots: Tensor, targets: Tensor) -> Slots:
        index = torch.arange(rows.numel(), device=rows.device)
        return cls(
            rows=rows,
            offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            slots=slots,
            targets=targets,
            row_of=index.repeat_interleave(counts),
            contiguous=bool(rows.numel() == 0 or int(rows[-1]) == rows.numel() - 1),
        )

    def keep(self, slot_is_active: Tensor) -> tuple[Slots, Tensor]:
        """Only the rows with at least one active slot (all slots of those rows).

        `slot_is_active` [S] bool, in sorted order. Returns the smaller Slots and `kept` [R'], the indices of its
        rows in this one.
        """
        active = torch.zeros(self.rows.numel(), dtype=torch.int64, device=self.rows.device)
        active = active.index_add_(0, self.row_of, slot_is_active.long()) > 0
        kept = active.nonzero().squeeze(1)
        if kept.numel() == self.rows.numel():
            return self, kept
        stay = active[self.row_of]
        counts = self.offsets.diff()[kept]
        return self._from_counts(self.rows[kept], counts, self.slots[stay], self.targets[stay]), kept

    def row_sums(self, values: Tensor) -> Tensor:
        """[R] sum over each row's slots of `values` [S]."""
        if values.device.type == "cpu":
            sums = torch.zeros(self.rows.numel(), dtype=values.dtype)
            return sums.index_add_(0, self.row_of, values)
        # In a fixed order; index_add_ would use atomics.
        return torch.segment_reduce(values, "sum", offsets=self.offsets, initial=0, unsafe=True)
