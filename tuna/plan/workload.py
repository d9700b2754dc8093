"""The groups of a micro-batch: of given lengths, or from a ranked file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from tuna.data.batching import GroupBatchSampler
from tuna_kernels import Group, tree_tokens

__all__ = ["METHODS", "Method", "Workload", "share_of"]

Method: TypeAlias = Literal["baseline", "unshared", "one_pass", "two_phase"]
"""How a step is computed: `baseline`: k padded copies and full logits (`compare.baseline`); `unshared`: the fused head
on k separate, unpadded sequences; `one_pass`: the packed tree; `two_phase`: candidates a few at a time."""
METHODS: tuple[Method, ...] = get_args(Method)


def share_of(method: Method) -> Literal["tree", "none"]:
    """What a method shares in a packed row."""
    return "none" if method == "unshared" else "tree"


@dataclass(frozen=True, eq=False)
class Workload:
    """The groups of a training step.

    Attributes:
        groups: real groups, tokenised, instead of the three numbers; micro-batches are those an epoch really has.
    """

    responses: int = field(default=5, metadata={"help": "Responses per group."})
    prompt_tokens: int = field(default=256, metadata={"help": "Length of a prompt, in tokens."})
    response_tokens: int = field(default=256, metadata={"help": "Length of a response, in tokens."})
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        for name in ("responses", "prompt_tokens", "response_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")

    def batch(self, count: int, method: Method) -> list[Group]:
        """The largest micro-batch of `count` groups: of an epoch's batches, the one with the most tokens.

        Raises:
            ValueError: fewer real groups than `count`.
        """
        if count < 1:
            raise ValueError(f"groups = {count} must be at least 1")
        if not self.groups:
            return [self._made()] * count
        if count > len(self.groups):
            raise ValueError(f"groups = {count} is more than the {len(self.groups)} groups of the data")
        batches = _epoch(self.groups, count)
        return max(batches, key=lambda batch: _weight(batch, method))

    def largest_batch(self) -> int:
        """Maximum number of groups of a micro-batch, regardless of memory."""
        return len(self.groups) or 1 << 20

    def describe(self) -> str:
        """A short description, for tables."""
        if self.groups:
            return f"{len(self.groups)} groups of the data"
        return f"k = {self.responses}, prompt {self.prompt_tokens} + response {self.response_tokens} tokens"

    def _made(self) -> Group:
        # The first tokens of the responses differ, so only the prompt is shared: the least possible sharing.
        rest = [0] * (self.response_tokens - 1)
        responses = [[c % 997, *rest] for c in range(self.responses)]
        if self.response_tokens > 1:
            for c, response in enumerate(responses):
                response[1] = c // 997
        return Group([0] * self.prompt_tokens, responses, ranks=list(range(self.responses)))


def _epoch(groups: Sequence[Group], count: int) -> list[list[Group]]:
    sampler = GroupBatchSampler(groups, groups_per_batch=count, seed=0)
    return [[groups[i] for i in rows] for rows in sampler.plan() if rows]


def _weight(batch: Sequence[Group], method: Method) -> int:
    """Tokens through the trunk: padded copies for the baseline, packed rows otherwise."""
    if method == "baseline":
        lengths = [len(group.prompt) + len(response) for group in batch for response in group.responses]
        return len(lengths) * max(lengths)
    return int(tree_tokens(batch, share=share_of(method)).sum())
