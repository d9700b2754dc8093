"""Vocabulary-parallel heads: each rank of a process group holds an equal shard of the LM head's rows.

Each rank computes log-sum-exp, entropy and, if it owns the target, the log-probability over its own shard, on any
backend; two all-reduces of a few numbers per slot combine them. The gradient of the combination needs no communication.

Who reduces what, as in Megatron-LM's output layer:

* Hidden states, targets and a LoRA's A are the same on every rank, and so must be the upstream gradient (every rank
  computes the same loss). Results are the same on every rank.
* The gradient of hidden states (and of their inputs, also through a LoRA's A) is a sum over the shards: it
  is **all-reduced here**, in its own dtype, and complete on every rank. Do not reduce it again. With sequence
  parallelism, gather the hidden states first by an operation whose backward takes this rank's part, not one that sums.
* The gradients of weight, bias and a LoRA's B are those of the rank's own shard: no reduction within the group
  (data-parallel groups reduce them like any other parameter).

A vocabulary padded to a multiple of the ranks has its padding at the end: `valid_vocab` is the number of real entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tuna_kernels import derivatives
from tuna_kernels.arguments import register_fake


@dataclass(frozen=True)
class Shard:
    """This rank's part of the vocabulary: entries `start … start + size`, of which `valid` are not padding."""

    group: str
    start: int
    size: int
    valid: int
    vocabulary: int  # entries of all ranks without padding

    @classmethod
    def of(cls, group: Any, size: int, valid_vocab: int | None) -> Shard:
        """The shard of `size` rows of this rank in a `ProcessGroup` or a group given by name."""
        group = resolve(group) if isinstance(group, str) else group
        padded = size * group.size()
        vocabulary = check_valid_vocab(valid_vocab, padded)
        start = size * group.rank()
        return cls(group.group_name, start, size, min(max(vocabulary - start, 0), size), vocabulary)

    def local(self, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(targets within the shard, which are in it, which are not ignored); targets of other shards become 0."""
        counted = targets != ignore_index
        here = targets - self.start
        mine = counted & (here >= 0) & (here < self.valid)
        return torch.where(mine, here, torch.where(counted, 0, ignore_index)), mine, counted


def resolve(name: str) -> dist.ProcessGroup:
    """The process group with a name (`ProcessGroup.group_name`); ops take names so that they can be compiled."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    return _resolve_process_group(name)  # type: ignore[arg-type]


def check_valid_vocab(valid_vocab: int | None, padded: int) -> int:
    """Validate `valid_vocab` for a vocabulary of `padded` entries; None means all."""
    if valid_vocab is None:
        return padded
    if not 0 < valid_vocab <= padded:
        raise ValueError(f"valid_vocab = {valid_vocab} must be in 1 … {padded}, the rows of the head")
    return valid_vocab


@torch.library.custom_op("tuna_kernels::all_reduce_sum", mutates_args=())
def all_reduce_sum(x: Tensor, group: str) -> Tensor:
    """The sum of `x` over the ranks of a group, a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=resolve(group))
    return total


@all_reduce_sum.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Copy(torch.autograd.Function):
    """Identity; the gradient is summed over the group."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed: Tensor = torch.ops.tuna_kernels.all_reduce_sum(gradients[0], ctx.group)
        return summed, None


def copy_to_group(x: Tensor, group: str) -> Tensor:
    """`x`, equal on every rank, for use with the rank's shard: its gradient is summed over the ranks."""
    copied: Tensor = _Copy.apply(x, group)  # type: ignore[no-untyped-call]
    return copied


class Combined(NamedTuple):
    """[M] each; `entropy` and `above` may be empty. For the backward: the shard's `weight` in the softmax, and the
    difference `above` of its mean logit from that of all shards."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    weight: Tensor
    above: Tensor


@torch.library.custom_op("tuna_kernels::combine_shards", mutates_args=())
def combine_shards(
    logprobs: Tensor,
    lse: Tensor,
    entropy: Tensor,
    state: Tensor,
    mine: Tensor,
    counted: Tensor,
    factor: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Combine the results of all shards into a `Combined`.

    The values come from `state` [3, M], the (target_logit, maximum, log_sum) of `tiled_linear.forward`, and the
    head's `factor`, which is exact for large logits too; the shard's `logprobs` and `lse` only carry the gradient.
    `mine` [M]: this rank owns the target; `counted` [M]: the slot is not ignored. A target owned by no rank or by
    more than one gives NaN.
    """
    ranks = resolve(group)
    target_logit, top, log_sum = state.double()
    maximum = top.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=ranks)
    reference = torch.where(maximum == -torch.inf, 0, maximum)
    of_shard = torch.where(top == -torch.inf, -torch.inf, factor * (top - reference) + log_sum)  # lse of the shard
    share = torch.exp(of_shard)
    parts = [share, torch.where(mine, target_logit, 0), mine.double()]
    mean = of_shard - entropy.double() if entropy.numel() else entropy.double()  # of the shard's logits
    if entropy.numel():
        parts.append(torch.where(share == 0, 0, share * mean))
    sums = torch.stack(parts)
    dist.all_reduce(sums, group=ranks)
    log_total = sums[0].log()
    logprob = torch.where(sums[2] == 1, factor * (sums[1] - maximum) - log_total, torch.nan)
    whole_mean = sums[3] / sums[0] if entropy.numel() else mean

    def finished(x: Tensor) -> Tensor:
        return torch.where(counted, x, 0).to(lse.dtype) if x.numel() else x.to(lse.dtype, copy=True)

    whole_entropy = log_total - whole_mean if entropy.numel() else mean
    above = torch.where(share == 0, 0, mean - whole_mean) if entropy.numel() else mean
    whole_lse = factor * maximum + log_total
    return Combined(*(finished(x) for x in (logprob, whole_lse, whole_entropy, share / sums[0], above)))


@register_fake(combine_shards)
def _(given: Any) -> Combined:
    like = torch.empty_like
    logprobs, lse, entropy = like(given.logprobs), like(given.lse), like(given.entropy)
    return Combined(logprobs, lse, entropy, weight=like(lse), above=like(entropy))


def _save(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    combined = Combined(*output)
    ctx.save_for_backward(inputs.mine, inputs.counted, combined.weight, combined.above)


def _gradients(
    ctx: Any,
    saved: Sequence[Any],
    g: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    *_: Tensor | None,
) -> dict[str, Tensor | None]:
    """Needs no communication."""
    mine, counted, weight, above = saved
    zero = torch.zeros_like(weight)
    g = zero if g is None else torch.where(counted, g, 0)
    g_lse = zero if g_lse is None else torch.where(counted, g_lse, 0)
    of_target = torch.where(mine, g, 0)
    of_lse = of_target + (g_lse - g) * weight
    if g_entropy is None or not above.numel():
        return {"logprobs": of_target, "lse": of_lse}
    of_entropy = torch.where(counted, g_entropy, 0) * weight
    return {"logprobs": of_target, "lse": of_lse - of_entropy * above, "entropy": of_entropy}


_INSTEAD = 'backend="reference" on the gathered head, without process_group'
derivatives.register(all_reduce_sum, instead=_INSTEAD)
derivatives.register(combine_shards, setup_context=_save, backward=_gradients, instead=_INSTEAD)
