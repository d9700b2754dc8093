"""Stops a run at a non-finite loss, before the weights are updated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from torch import Tensor

SHOWN_IDS = 20


class FiniteLoss:
    """Checks the losses of an optimizer step once, before its last backward and so before the weights change.

    All ranks check together and stop together. One host synchronisation per step.

    Args:
        wish: whether this rank wants the run to end after the step; shared between the ranks at the same time.

    Attributes:
        wished: whether any rank wanted to end at the last check.
    """

    def __init__(self, wish: Callable[[], bool] = lambda: False) -> None:
        self.wished = False
        self._wish = wish
        self._expected = 0
        self._seen: list[tuple[Tensor, list[str]]] = []

    def start_step(self, batches: int) -> None:
        """Start a step of `batches` micro-batches on this rank."""
        self._expected, self._seen = batches, []

    def add(self, loss: Tensor, ids: list[str], step: int) -> None:
        """Add the loss of a micro-batch of these records; the step's last call checks all of them.

        Raises:
            FloatingPointError: non-finite loss; raised on all ranks, names the step and the records.
        """
        self._seen.append((torch.isfinite(loss.detach()), ids))
        if len(self._seen) != self._expected:
            return
        bad = ~torch.stack([finite for finite, _ in self._seen])
        flags = torch.stack([bad.any(), torch.tensor(self._wish(), device=bad.device)]).to(torch.int32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        anywhere, self.wished = map(bool, flags.tolist())
        if not anywhere:
            return
        mine = [batch for flag, (_, batch) in zip(bad.tolist(), self._seen, strict=True) if flag]
        records = [record for batch in gather_object(mine) for record in batch]
        more = f" and {len(records) - SHOWN_IDS} more" if len(records) > SHOWN_IDS else ""
        raise FloatingPointError(
            f"non-finite loss at step {step}, in micro-batches with the records "
            f"{', '.join(records[:SHOWN_IDS])}{more}; this step did not change the weights and the last checkpoint is "
            "intact: check these records, lower learning_rate or set max_grad_norm, and continue with --resume"
        )


def check_gradient(norm: float, step: int) -> None:
    """Check that the gradient norm is finite.

    Raises:
        FloatingPointError: it is not; nothing of this step is saved in a checkpoint.
    """
    if not abs(norm) < float("inf"):
        raise FloatingPointError(
            f"non-finite gradient at step {step} (norm {norm}): stopped before saving; continue from the last "
            "checkpoint with --resume and a lower learning_rate or max_grad_norm"
        )
