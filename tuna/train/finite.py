"""What stops a run before it does harm: a loss that is no number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from torch import Tensor

SHOWN_IDS = 20


class FiniteLoss:
    """Looks at the losses of an optimizer step once, before its last backward and so before the weights move.

    All ranks look together and stop together. One host synchronisation a step.

    Args:
        wish: whether this rank wants the run to end after the step; the ranks come to know of it together, too.

    Attributes:
        wished: whether any rank did, at the last look.
    """

    def __init__(self, wish: Callable[[], bool] = lambda: False) -> None:
        self.wished = False
        self._wish = wish
        self._expected = 0
        self._seen: list[tuple[Tensor, list[str]]] = []

    def start_step(self, batches: int) -> None:
        """A step of so many micro-batches of this rank begins."""
        self._expected, self._seen = batches, []

    def add(self, loss: Tensor, ids: list[str], step: int) -> None:
        """Take in the loss of a micro-batch of these records; at the step's last one, look at all.

        Raises:
            FloatingPointError: on all ranks, with the step and the records of the micro-batches at fault.
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
            f"the loss of step {step} is not finite, in micro-batches of the records "
            f"{', '.join(records[:SHOWN_IDS])}{more}; the weights are those before the step and the last checkpoint is "
            "untouched: look at these records, lower learning_rate or set max_grad_norm, and go on with --resume"
        )


def check_gradient(norm: float, step: int) -> None:
    """Hold that the gradient's norm is a number.

    Raises:
        FloatingPointError: it is not; nothing of this step gets into a checkpoint.
    """
    if not abs(norm) < float("inf"):
        raise FloatingPointError(
            f"the gradient norm of step {step} is {norm}: stopped before a checkpoint could hold it; go on from the "
            "last checkpoint with --resume and a lower learning_rate or max_grad_norm"
        )
