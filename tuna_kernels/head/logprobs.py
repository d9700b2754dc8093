"""Per-token log-probabilities, from hidden states and an LM head or from existing logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuna_kernels.arguments import compute_dtype, dense_rows, should_validate
from tuna_kernels.dispatch import resolve_backend
from tuna_kernels.errors import CannotServe
from tuna_kernels.head import parallel, reference
from tuna_kernels.head.backends import unit_gradient_pays
from tuna_kernels.head.tiled_linear import LinearCall

# Bounds on factors and divisors of logits: they and their reciprocals are normal float32 numbers.
SMALLEST, LARGEST = 1e-37, 1e37
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    valid_vocab: int | None = None,
    process_group: Any = None,
    accumulate_into: Tensor | None = None,
    filter_eps: float = 0.0,
    validate: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """`log softmax(z)[target]` for each slot, `z = softcap(logit_scale * (h W^T + bias))`, without full logits.

    Differentiable with respect to hidden, weight, bias and the LoRA matrices, with a separate upstream gradient for
    every slot; log-sum-exp and entropy are differentiable too. Inputs that need no gradient cost nothing; with a frozen
    head the forward keeps each row's unit gradient, and the backward needs no logits.

    Args:
        hidden: [T, D] final hidden states.
        weight: [V, D] LM head; its floating dtype may differ from that of `hidden` (converted tile by tile, never
            as a whole). Rows must be dense (stride 1 along D); a transposed weight is copied.
        targets: [M] int64 target tokens in `[0, V)` or `ignore_index`.
        rows: [M] int64 the hidden row of each slot, in `[0, T)`; default: slot m uses row m (then M = T). A row
            may have many slots; its log-sum-exp is computed once.
        bias: [V], added before the scale.
        lora: `(A [r, D], B [V, r], scale)` adds `scale * (h A^T) B^T` to `h W^T`.
        ignore_index: slots with this target have log-probability 0 and no gradient.
        logit_scale: factor on the logits.
        softcap: c in `c * tanh(z / c)`, applied after the scale; None for no softcap.
        return_lse: also return the log-sum-exp of each slot's row, [M].
        return_entropy: also return the entropy (nats) of each slot's row, [M].
        valid_vocab: use only the first entries of a padded vocabulary; default: all.
        process_group: a `torch.distributed` group (or its `group_name`) of which each rank holds V rows of the
            head, in rank order; targets and `valid_vocab` refer to the whole vocabulary, results are the same on all
            ranks. The gradient of hidden is summed over the group here; that of the head covers the rank's own rows
            (`tuna_kernels.head.parallel` says who reduces what).
        accumulate_into: [V, D] float32 (float64 for float64 inputs) to which the backward adds the weight's
            gradient, such as `weight.main_grad`; `weight.grad` is unchanged and none of its hooks fires. Not
            supported under torch.compile.
        filter_eps: the backward may skip a vocabulary entry whose dL/dlogit, including the upstream, is below this
            in every row. The error of a hidden row's gradient is then at most `filter_eps` times the sum of the
            skipped rows' norms, `filter_eps * sum_v |w_v|`; a skipped row of the weight's gradient is 0, with an error
            of at most `filter_eps * sum_t |h_t|`. 0: exact. Only used by `triton`.
        validate: whether to check the values of targets and rows; default: only on CPU (elsewhere it would
            synchronize; an out-of-range target then gives NaN).
        backend: `"auto"`, `"triton"`, `"cpu"`, `"torch"` or `"reference"`.

    Returns:
        logprobs [M], or a tuple of logprobs and the requested lse and entropy, in this order; float64 if any input
        is float64, else float32.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices that do not match; an empty or sharded weight.
        IndexError: a target or row out of range, with its position.
        RuntimeError: an explicit backend that does not support the call.

    Examples:
        >>> h, w = torch.zeros(2, 3), torch.zeros(4, 3)
        >>> linear_logprobs(h, w, torch.tensor([1, 2, 3]), rows=torch.tensor([0, 0, 1]))
        tensor([-1.3863, -1.3863, -1.3863])
    """
    dtypes = check_head(hidden, weight, bias, lora, logit_scale, softcap)
    check_index("targets", targets, hidden.device)
    if rows is None:
        if targets.shape[0] != hidden.shape[0]:
            raise ValueError(f"targets [{targets.shape[0]}] must match hidden [{hidden.shape[0]}, …] without rows")
    else:
        check_index("rows", rows, hidden.device)
        if rows.shape != targets.shape:
            raise ValueError(f"rows {list(rows.shape)} and targets {list(targets.shape)} must both be [M]")
    check_accumulation(weight, accumulate_into, compute_dtype(*dtypes), filter_eps)
    shard = None if process_group is None else parallel.Shard.of(process_group, weight.shape[0], valid_vocab)
    vocabulary = shard.vocabulary if shard else parallel.check_valid_vocab(valid_vocab, weight.shape[0])
    if should_validate(validate, hidden):
        check_range("targets", targets, vocabulary, "the vocabulary", ignore_index)
        if rows is not None:
            check_range("rows", rows, hidden.shape[0], "the rows of hidden")
    chosen = resolve_backend(backend, hidden.device, *dtypes)
    low_rank = low_rank_pair(hidden, lora, compute_dtype(*dtypes))
    call = _Options(
        rows, ignore_index, float(logit_scale), None if softcap is None else float(softcap), return_entropy,
        filter_eps, chosen, shard is not None,
    )  # fmt: skip
    if shard is None:
        head = _HeadTensors(weight, bias, low_rank, accumulate_into).first(vocabulary)
        logprobs, lse, entropy, _ = _compute(hidden, head, targets, call)
    else:
        head = _HeadTensors(weight, bias, low_rank, accumulate_into)
        logprobs, lse, entropy = _compute_sharded(hidden, head, targets, call, shard)
    wanted = (logprobs, *([lse] if return_lse else []), *([entropy] if return_entropy else []))
    return wanted if len(wanted) > 1 else logprobs


class _Options(NamedTuple):
    """The options of a call."""

    rows: Tensor | None
    ignore_index: int
    logit_scale: float
    softcap: float | None
    return_entropy: bool
    filter_eps: float
    backend: str
    sharded: bool


class _HeadTensors(NamedTuple):
    """A head's tensors along the vocabulary; `low_rank` is (scale * h A^T [T, r], B [V, r])."""

    weight: Tensor
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None
    main_grad: Tensor | None

    def first(self, entries: int) -> _HeadTensors:
        """The first `entries` of the vocabulary."""
        if entries == self.weight.shape[0]:
            return self
        return _HeadTensors(
            self.weight[:entries],
            None if self.bias is None else self.bias[:entries],
            None if self.low_rank is None else (self.low_rank[0], self.low_rank[1][:entries]),
            None if self.main_grad is None else self.main_grad[:entries],
        )


def _compute(
    hidden: Tensor, head: _HeadTensors, targets: Tensor, call: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(logprobs, lse, entropy, state)` of the whole `head`; `state` [3, M] as in `tiled_linear.forward`."""
    if call.backend == "reference":
        if head.main_grad is not None:
            raise CannotServe("backend = 'reference' does not support accumulate_into: it is plain autograd")
        return reference.linear_logprobs(
            hidden,
            head.weight,
            targets,
            call.rows,
            head.bias,
            head.low_rank,
            ignore_index=call.ignore_index,
            logit_scale=call.logit_scale,
            softcap=call.softcap,
            want_entropy=call.return_entropy,
            want_state=call.sharded,
        )
    keep_unit = (
        torch.is_grad_enabled()
        and hidden.requires_grad
        and head.low_rank is None
        and not (head.weight.requires_grad or call.return_entropy)
        and not (head.bias is not None and head.bias.requires_grad)
        and unit_gradient_pays(call.backend, hidden.shape[1], hidden.dtype, head.weight.dtype)
    )
    low_hidden, low_weight = head.low_rank or (None, None)
    logprobs, lse, entropy, _unit, state = torch.ops.tuna_kernels.linear_logprobs(
        *LinearCall(hidden, head.weight, head.bias, low_hidden, low_weight, call.logit_scale, call.softcap),
        targets=targets,
        rows=call.rows,
        ignore_index=call.ignore_index,
        want_entropy=call.return_entropy,
        keep_unit=keep_unit,
        backend=call.backend,
        main_grad=head.main_grad,
        filter_eps=call.filter_eps,
    )
    return logprobs, lse, entropy, state


def _compute_sharded(
    hidden: Tensor, head: _HeadTensors, targets: Tensor, call: _Options, shard: parallel.Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_compute`, over the shards of a process group."""
    hidden = parallel.copy_to_group(hidden, shard.group)
    if head.low_rank is not None:
        head = head._replace(low_rank=(parallel.copy_to_group(head.low_rank[0], shard.group), head.low_rank[1]))
    local, mine, counted = shard.local(targets, call.ignore_index)
    logprobs, lse, entropy, state = _compute(hidden, head.first(max(shard.valid, 1)), local, call)
    if shard.valid == 0:  # only padding, but still connected to the graph, so that all ranks run a backward
        state = torch.full_like(state, -torch.inf)
    if not call.return_entropy:
        entropy = entropy[:0]
    # The reference's state is in terms of z itself.
    steep = call.softcap is None and call.backend != "reference"
    logprobs, lse, entropy, *_ = torch.ops.tuna_kernels.combine_shards(
        logprobs=logprobs,
        lse=lse,
        entropy=entropy,
        state=state.detach(),
        mine=mine,
        counted=counted,
        factor=max(abs(call.logit_scale), SMALLEST) if steep else 1.0,
        group=shard.group,
    )
    return logprobs, lse, entropy


def selective_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """`log softmax(logits / temperature)[target]` of existing logits, in float32 or better.

    Args:
        logits: [..., V] floating point.
        targets: [...] int64 in `[0, V)` or `ignore_index` (log-probability 0, zero gradient).
        temperature: positive.
        inplace_backward: let the backward overwrite `logits` with their gradient, which saves the memory of a second
            tensor. For logits that are not read afterwards (a second backward is an error); ignored by the reference
            backend.
        validate: as in `linear_logprobs`.
        backend: as in `linear_logprobs`.

    Returns:
        [...]: float64 for float64 logits, else float32. The gradient has the dtype of the logits.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `linear_logprobs`.

    Examples:
        >>> selective_logprobs(torch.zeros(2, 4), torch.tensor([3, -100]))
        tensor([-1.3863,  0.0000])
    """
    if logits.dtype not in FLOATING:
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim < 1 or targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets {list(targets.shape)} must match logits {list(logits.shape)} without the last axis")
    if targets.dtype != torch.int64 or targets.device != logits.device:
        raise TypeError(f"targets must be int64 on {logits.device}, got {targets.dtype} on {targets.device}")
    if not SMALLEST <= temperature <= LARGEST:
        raise ValueError(f"temperature = {temperature} must be positive, from {SMALLEST} to {LARGEST}")
    flat = logits.reshape(-1, logits.shape[-1])
    flat_targets = targets.reshape(-1)
    if should_validate(validate, logits):
        check_range("targets", flat_targets, logits.shape[-1], "the vocabulary", ignore_index)
    chosen = resolve_backend(backend, logits.device, logits.dtype)
    if chosen == "reference":
        return reference.selective_logprobs(logits, targets, temperature=temperature, ignore_index=ignore_index)
    if inplace_backward:  # the op overwrites its argument: dense rows that do not overlap
        flat = flat.contiguous() if flat.stride(0) < flat.shape[1] else dense_rows(flat)
    logprobs: Tensor = torch.ops.tuna_kernels.selective_logprobs(
        flat, flat_targets, float(temperature), ignore_index, chosen, inplace_backward
    )[0]
    return logprobs.view(targets.shape)


def low_rank_pair(
    hidden: Tensor, lora: tuple[Tensor, Tensor, float] | None, compute: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """`(scale * h A^T [T, r] in the compute type, B [V, r])`: the head's adapter as a second, narrow product."""
    if lora is None:
        return None
    a, b, scale = lora
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.to(compute) @ a.to(compute).t()) * scale, b


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
    logit_scale: float,
    softcap: float | None,
) -> list[torch.dtype]:
    """Check shapes, dtypes and devices of hidden states and head; returns the dtypes, which set the compute type."""
    lora_tensors = {} if lora is None else {"lora A": lora[0], "lora B": lora[1]}
    tensors = {"hidden": hidden, "weight": weight, **({} if bias is None else {"bias": bias}), **lora_tensors}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be one of {[str(d) for d in FLOATING]}, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
        if type(tensor).__name__ == "DTensor":
            raise ValueError(
                f"{name} is a sharded DTensor (FSDP or tensor parallel): call inside the module that owns it, "
                "where it is gathered, or pass tensor.full_tensor()"
            )
    if weight.numel() == 0 and hidden.shape[-1] != 0:
        raise ValueError(
            f"weight {list(weight.shape)} is empty: under DeepSpeed ZeRO-3 a parameter is available only inside the "
            "forward of the module that owns it (or under deepspeed.zero.GatheredParameters)"
        )
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} must be [T, D] and weight {list(weight.shape)} [V, D]")
    vocabulary, width = weight.shape
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"bias {list(bias.shape)} must be [{vocabulary}]")
    if lora is not None:
        a, b, _ = lora
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != width or b.shape != (vocabulary, a.shape[0]):
            raise ValueError(
                f"lora A {list(a.shape)} must be [r, {width}] and B {list(b.shape)} [{vocabulary}, r] with the same r"
            )
    if softcap is not None and not SMALLEST <= softcap <= LARGEST:
        raise ValueError(f"softcap = {softcap} must be positive, from {SMALLEST} to {LARGEST}, or None for no cap")
    if logit_scale != 0 and not SMALLEST <= abs(logit_scale) <= LARGEST:
        raise ValueError(
            f"logit_scale = {logit_scale} must be finite: 0, or with a magnitude from {SMALLEST} to {LARGEST}"
        )
    return [tensor.dtype for tensor in tensors.values()]


def check_accumulation(weight: Tensor, accumulate_into: Tensor | None, compute: torch.dtype, filter_eps: float) -> None:
    """Check `accumulate_into` and `filter_eps`."""
    if not 0 <= filter_eps < float("inf"):
        raise ValueError(f"filter_eps = {filter_eps} must be 0 or a small positive number")
    if accumulate_into is None:
        return
    if accumulate_into.shape != weight.shape or accumulate_into.device != weight.device:
        raise ValueError(
            f"accumulate_into {list(accumulate_into.shape)} on {accumulate_into.device} must match weight, "
            f"{list(weight.shape)} on {weight.device}"
        )
    if accumulate_into.dtype != compute or accumulate_into.requires_grad or accumulate_into.stride(-1) != 1:
        raise TypeError(
            f"accumulate_into must be {compute} with dense rows and no gradient of its own, got {accumulate_into.dtype}"
            f", strides {accumulate_into.stride()}, requires_grad={accumulate_into.requires_grad}"
        )
    if not weight.requires_grad:
        raise ValueError("accumulate_into is given, but weight does not require a gradient")


def check_index(name: str, index: Tensor, device: torch.device) -> None:
    """Check that `index` is a 1-D int64 tensor on the device."""
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"{name} must be 1-D, got {list(index.shape)}")
    if index.device != device:
        raise ValueError(f"{name} is on {index.device}, hidden on {device}")


def check_range(name: str, index: Tensor, limit: int, what: str, ignore_index: int | None = None) -> None:
    """Check that every entry is in `[0, limit)` or equals `ignore_index`."""
    bad = (index < 0) | (index >= limit)
    if ignore_index is not None:
        bad &= index != ignore_index
    if bool(bad.any()):
        position = int(bad.nonzero()[0])
        raise IndexError(f"{name}[{position}] = {int(index[position])} is outside {what} of {limit}")
