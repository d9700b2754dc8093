"""What must hold before a tree's numbers can be trusted: known families, positions within range, a
self-check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuna_kernels.tree import Group, PackedTree, pack_groups

TESTED_FAMILIES = frozenset(
    {"cohere", "gemma2", "gpt2", "granite", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"}
)
"""Model types whose scores and gradients the test suite compares with separate sequences in float64."""


def check_positions(model: PreTrainedModel, longest: Callable[[], int]) -> None:
    """Refuse sequences for which the position code depends on the whole batch, or has no entry.

    Args:
        model: the causal LM.
        longest: gives the tokens of the longest sequence (asked only where it matters: it synchronises).

    Raises:
        ValueError: a rotary frequency that would depend on the batch's longest sequence ("dynamic",
            "longrope" beyond the original length), or a sequence longer than the learned positions.
    """
    rotary = False
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        rotary = rotary or kind is not None or hasattr(module, "inv_freq")
        for layer, name in kind.items() if isinstance(kind, dict) else [(None, kind)]:
            if not isinstance(name, str) or not ("dynamic" in name or name == "longrope"):
                continue
            limit = _original_length(module, layer, name)
            if longest() > limit:
                raise ValueError(
                    f"a sequence of {longest()} tokens is beyond the original {limit} of {name!r} rotary positions, "
                    f"whose frequencies then depend on the longest sequence packed: keep sequences within {limit} "
                    "tokens"
                )
    learned = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not rotary and learned is not None and longest() > learned:
        raise ValueError(f"a sequence of {longest()} tokens exceeds the model's {learned} positions")


def _original_length(module: nn.Module, layer: str | None, kind: str) -> int:
    if kind == "longrope":
        parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
        return int((parameters if layer is None else parameters[layer])["original_max_position_embeddings"])
    return int(module.original_max_seq_len)  # type: ignore[arg-type]


def small_groups(model: PreTrainedModel) -> list[Group]:
    """Two groups that exercise every case of the rule: a second group, deeper sharing, a candidate within another."""
    config = model.config.get_text_config()
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    usable = torch.tensor([token for token in range(min(config.vocab_size, 4096)) if token not in special])
    pick = torch.randint(len(usable), (40,), generator=torch.Generator().manual_seed(0))
    t = usable[pick].tolist()
    return [
        Group(prompt=t[:6], responses=[t[6:12], [*t[6:8], *t[12:17]], t[6:9], t[17:19]]),
        Group(prompt=t[20:24], responses=[t[24:31], t[31:36]]),
    ]


def sequences(groups: list[Group]) -> list[tuple[list[int], int]]:
    """(prompt + response, length of the prompt) of every candidate in order."""
    return [
        ([*map(int, group.prompt), *map(int, response)], len(group.prompt))
        for group in groups
        for response in group.responses
    ]


def stock_logprobs(model: nn.Module, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] by the model's own forward: sequence by sequence, and all in one padded batch.

    Their difference is what rounding alone does to this model in its dtype.
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


def compare(model: PreTrainedModel, stock: tuple[Tensor, Tensor], score: Callable[[PackedTree], Tensor]) -> None:
    """Refuse the model unless ``score`` of a small tree agrees with its own forward up to rounding.

    The bound is four times the root mean square by which the model's own forward changes between single
    sequences and a padded batch, plus a floor for the dtype. A wrong mask shows as 0.01 to 0.4 on models with
    trained weights; in half precision the bound is of that order too, so the check is then coarse.

    Raises:
        ValueError: they differ.
    """
    alone, together = stock
    got = score(pack_groups(small_groups(model))).to(alone)
    noise = (alone - together).square().mean().sqrt().item()
    dtype = next(model.parameters()).dtype
    rounding = 4 * torch.finfo(dtype).eps * max(1.0, alone.abs().mean().item())
    floor = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, rounding)
    bound = 4 * noise + floor
    error = (got - alone).square().mean().sqrt().item()
    if not error <= bound:
        raise ValueError(
            f"{type(model).__name__} (model type {model.config.model_type!r}) does not compute the same on a tree as "
            f"on separate sequences: log-probabilities differ by {error:.2g} (root mean square, limit {bound:.2g}); "
            "it does something between tokens or with its logits that tuna_tree does not know"
        )


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
