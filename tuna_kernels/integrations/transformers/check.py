"""Checks that a model is correct on a tree: positions within range, and one numerical check per model.

The numerical check compares a tiny tree with the model's own forward on separate sequences: six sequences and a tree,
some 100 tokens in total. It depends on what the model computes, not on its name: a subclass, a hook, a nonlinear head,
an adapter or remote code all show in the numbers. It runs once per model object, and again when a forward or a hook
anywhere in it has changed (`signature`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from tuna_kernels.integrations.transformers.row_numbers import CORRECTED, RowNumbers
from tuna_kernels.tree import Group, PackedTree, pack_groups

DRAWS = 3
"""Random token draws, one of which must agree: in a mixture of experts rounding may route a token to another expert."""

IN_FLOAT32 = 1 << 30
"""Bytes of half-precision weights up to which the check computes in float32, on a temporary copy."""

_BETWEEN_ROWS = {
    "Mamba|DeltaNet|DeltaAttention|ShortConv|Rwkv|RWKV|xLSTM|RecurrentBlock|LightningAttention|LinearAttention": (
        "is recurrent: its state would carry over from one branch to the next in the packed row, and only attention "
        "can follow a tree"
    ),
    "Compressor": "builds one key from a block of neighbouring rows, which in a tree belong to several sequences",
    "Indexer": "selects the highest-scoring keys among all previous rows, which in a tree belong to several sequences",
}
"""Layers, by class name, that mix tokens other than by attention, and why they cannot follow a tree."""

_ENGINES = ("deepspeed", "accelerate", "torch.distributed")


def check_positions(model: PreTrainedModel, longest: Callable[[], int]) -> None:
    """Reject sequences whose positional encoding depends on the whole batch, or does not exist.

    Args:
        model: the causal LM.
        longest: returns the number of tokens of the longest sequence (called only if needed: it synchronizes).

    Raises:
        ValueError: a rotary frequency that would depend on the batch's longest sequence ("dynamic",
            "longrope" beyond the original length), or a sequence longer than the learned positions.
    """
    if (limit := _position_limit(model)) is not None and longest() > limit[0]:
        raise ValueError(f"a sequence of {longest()} tokens {limit[1]}")


def _position_limit(model: PreTrainedModel) -> tuple[int, str] | None:
    """The maximum length of a sequence, and the message for a longer one."""
    rotary = False
    found: list[tuple[int, str]] = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        rotary = rotary or kind is not None or hasattr(module, "inv_freq")
        for layer, name in kind.items() if isinstance(kind, dict) else [(None, kind)]:
            if isinstance(name, str) and ("dynamic" in name or name == "longrope"):
                limit = _original_length(module, layer, name)
                found.append(
                    (
                        limit,
                        f"is beyond the original {limit} of {name!r} rotary positions, whose frequencies then depend "
                        f"on the longest sequence packed: keep sequences within {limit} tokens",
                    )
                )
    learned = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not rotary and learned is not None:
        found.append((learned, f"exceeds the model's {learned} positions"))
    return min(found, default=None)


def _original_length(module: nn.Module, layer: str | None, kind: str) -> int:
    if kind == "longrope":
        parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
        return int((parameters if layer is None else parameters[layer])["original_max_position_embeddings"])
    return int(module.original_max_seq_len)  # type: ignore[arg-type]


def check_embedding_noise(model: PreTrainedModel) -> None:
    """Reject NEFTune in training mode: its noise would be scaled for the packed row.

    Raises:
        ValueError: the input embeddings have a NEFTune hook, of transformers or another library.
    """
    embeddings = model.get_input_embeddings()
    if embeddings.training and any("neftune" in _name(hook) for hook in embeddings._forward_hooks.values()):
        raise ValueError(
            "NEFTune is on (neftune_noise_alpha): its noise is scaled by the length of the input, here of all groups "
            "of a packed row, and a shared prompt would draw it once for all its responses; remove the hook"
        )


def _name(function: Any) -> str:
    return str(getattr(getattr(function, "func", function), "__qualname__", "")).lower()


def why_not(model: nn.Module) -> str:
    """Which layer mixes tokens in a way that cannot follow a tree, judged by class names; "" if none."""
    for module in model.modules():
        for pattern, reason in () if isinstance(module, PreTrainedModel) else _BETWEEN_ROWS.items():
            if re.search(pattern, type(module).__name__):
                return f"{type(module).__name__} {reason}"
    return ""


def convolution(model: nn.Module) -> str:
    """As `why_not`, for a model that has failed the check (an image or audio encoder may convolve, too)."""
    for module in model.modules():
        for part in module.children():
            if isinstance(part, nn.Conv1d) and part.kernel_size[0] > 1:
                return (
                    f"{type(module).__name__} convolves neighbouring rows, which in a tree belong to several sequences"
                )
    return ""


def before_head(model: nn.Module, base: PreTrainedModel, backbone: nn.Module) -> str:
    """As `convolution`: whether the head's input differs from the backbone's last hidden states."""
    seen: dict[str, Tensor] = {}
    head: nn.Module = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    hooks = (
        backbone.register_forward_hook(lambda _, args, out: seen.update(out=out[0])),
        head.register_forward_pre_hook(lambda _, args: seen.update(to_head=args[0])),
    )
    try:
        stock_logprobs(model, small_groups(base)[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) == 2 and not torch.equal(seen["to_head"], seen["out"]):
        return "its head is more than a linear layer: there are other layers between it and the last hidden states"
    return ""


def can_run(model: nn.Module) -> bool:
    """Whether the weights have values: none is on the meta device or fake, and hooks gather ZeRO-3 shards."""
    sharded = False
    for p in model.parameters():
        if p.device.type == "meta" or isinstance(p, FakeTensor):
            return False
        sharded = sharded or (hasattr(p, "ds_id") and p.numel() == 0)
    hooks = (h for module in model.modules() for table in _hooks(module) for h in table.values())
    return not sharded or any(map(_of_engine, hooks))


def signature(*modules: nn.Module) -> tuple[Any, ...]:
    """Everything that determines what these modules compute: classes, their forwards, instance forwards, hooks.

    Excluded are hooks of engines that move weights, and the one by which transformers makes embeddings require
    gradients (for checkpointing and adapters). Hook keys are never reused.
    """
    return tuple(
        (
            id(module),
            type(module),
            id(type(module).forward),
            None if "_original_forward" in vars(module) else id(vars(module).get("forward")),  # accelerate's autocast
            *(key for table in _hooks(module) for key, h in table.items() if not _leaves_values(h)),
        )
        for module in modules
    )


def _hooks(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], ...]:
    return module._forward_hooks, module._forward_pre_hooks


def _leaves_values(hook: Any) -> bool:
    return _of_engine(hook) or "make_inputs_require_grads" in _name(hook)


def _of_engine(function: Any) -> bool:
    function = getattr(function, "func", function)  # of a partial
    return str(getattr(function, "__module__", "")).startswith(_ENGINES)


def small_groups(model: PreTrainedModel, draw: int = 0) -> list[Group]:
    """Two groups covering every case of the rule: a second group, deeper sharing, a candidate that prefixes another."""
    config = model.config.get_text_config()
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    usable = torch.tensor([token for token in range(min(config.vocab_size, 4096)) if token not in special])
    t = usable[torch.randint(len(usable), (40,), generator=torch.Generator().manual_seed(draw))].tolist()
    long = 13 if (limit := _position_limit(model)) is None else limit[0]
    prompts, responses = (6, 7) if long >= 13 else (long // 2, long - long // 2)  # a toy model may have fewer positions
    return [
        Group(t[:prompts], [y[:responses] for y in (t[6:12], [*t[6:8], *t[12:17]], t[6:9], t[17:19])]),
        Group(t[20:24][:prompts], [y[:responses] for y in (t[24:31], t[31:36])]),
    ]


def sequences(groups: list[Group]) -> list[tuple[list[int], int]]:
    """(prompt + response, length of the prompt) of every candidate, in order."""
    return [
        ([*map(int, group.prompt), *map(int, response)], len(group.prompt))
        for group in groups
        for response in group.responses
    ]


def stock_logprobs(model: nn.Module, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] from the model's own forward: sequence by sequence, and in one padded batch.

    Their difference shows the effect of rounding alone on this model in its dtype.
    """
    whole = sequences(groups)
    device = next(model.parameters()).device
    longest = max(len(ids) for ids, _ in whole)
    ids = torch.tensor([ids + [ids[-1]] * (longest - len(ids)) for ids, _ in whole], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in whole], device=device)
    batched = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    alone: list[Tensor] = []
    together: list[Tensor] = []
    for i, (tokens, prompt) in enumerate(whole):
        logits = model(input_ids=ids[i : i + 1, : len(tokens)], use_cache=False).logits[0]
        for out, found in ((alone, logits), (together, batched[i])):
            logprobs = torch.log_softmax(found[prompt - 1 : len(tokens) - 1].double(), -1)
            out.append(logprobs.gather(1, ids[i, prompt : len(tokens), None]).squeeze(1))
    return torch.cat(alone), torch.cat(together)


Score = Callable[[PackedTree], Tensor]


def compare(model: PreTrainedModel, stock: Callable[[list[Group]], tuple[Tensor, Tensor]], score: Score) -> None:
    """Reject the model unless `score` of a small tree agrees with its own forward up to rounding.

    The bound is four times the root mean square difference of the model's own forward between single
    sequences and a padded batch, plus a floor for the dtype: 1e-4 in float32, and in float64, where families compute
    norms or softmaxes in float32. A wrong mask causes differences of 0.01 to 0.4 on models with trained weights; in
    half precision with weights too large for a copy (`in_float32`) the bound is of that order too: the check is coarse.

    Args:
        model: the causal LM.
        stock: as `stock_logprobs`.
        score: log-probabilities [M] of a tree.

    Raises:
        ValueError: they differ, or the model counts the rows of its input.
    """
    dtype = next(model.parameters()).dtype
    half = dtype in (torch.float16, torch.bfloat16)
    noise = error = bound = 0.0
    for draw in range(DRAWS):
        groups = small_groups(model, draw)
        alone, together = stock(groups)
        if not alone.isfinite().all():
            raise ValueError(f"{type(model).__name__} cannot be checked: its own forward gives {alone.sum().item()}")
        together = torch.where(together.isfinite(), together, alone)  # padding is NaN in eager float64 attention
        got = score(pack_groups(groups)).to(alone)
        noise = max(noise, (alone - together).square().mean().sqrt().item())
        floor = (4 * torch.finfo(dtype).eps if half else 1e-4) * max(1.0, alone.abs().mean().item())
        bound = min(4 * noise, 0.25 if half else 0.01) + floor
        nearest = torch.minimum((got - alone).abs(), (got - together).abs())
        error = nearest.square().mean().sqrt().item()
        if error <= bound:
            break
    else:
        raise ValueError(
            f"{type(model).__name__} (model type {model.config.model_type!r}) does not compute the same on a tree as "
            f"on separate sequences: log-probabilities differ by {error:.2g} (root mean square, limit {bound:.2g}); "
            + (
                _rows_counted(small_groups(model), score)
                or "it mixes tokens or transforms its logits in a way that tuna_tree does not support"
            )
        )
    if counted := _rows_counted(groups, score):
        raise ValueError(f"{type(model).__name__} cannot run on a tree: {counted}")


def _rows_counted(groups: list[Group], score: Score) -> str:
    """Which layer computes with row numbers, or "".

    Two trees of different sizes are compared, since another dimension may happen to equal one of the sizes.
    """
    found: set[tuple[str, str]] | None = None
    for some in (groups, groups[:1]):
        tree = pack_groups(some)
        with RowNumbers(tree.num_tokens) as numbers:
            score(tree)
        found = numbers.found if found is None else found & numbers.found
    counted = sorted(pair for pair in found or () if pair[0] not in CORRECTED)
    if not counted:
        return ""
    layer, operation = counted[0]
    return (
        f"{layer} counts the rows of its input ({operation} of row numbers) instead of using position_ids, and row "
        "numbers of a tree are not positions"
    )


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or autocast (accelerate's included); restores the mode of every module."""
    training = {module: module.training for module in model.modules()}
    wrapped = {m: vars(m).pop("forward") for m in training if {"forward", "_original_forward"} <= vars(m).keys()}
    model.eval()
    try:
        device = next(model.parameters()).device.type
        # eager: compiled graphs would be specialized to the check's dtype and mode
        with torch.no_grad(), torch.autocast(device, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for module, forward in wrapped.items():
            module.forward = forward


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Temporarily convert half-precision weights to float32, if they are small enough (`IN_FLOAT32`)."""
    half = [
        tensor
        for tensor in [*model.parameters(), *model.buffers()]
        if type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    sharded = any(hasattr(p, "ds_id") for p in model.parameters())
    quantised = any(not p.is_floating_point() or p.itemsize < 2 for p in model.parameters())
    if sharded or quantised or sum(tensor.nbytes for tensor in half) > IN_FLOAT32:
        yield
        return
    before = [tensor.data for tensor in half]
    try:
        for tensor in half:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(half, before, strict=True):
            tensor.data = data
