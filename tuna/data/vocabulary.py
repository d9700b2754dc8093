"""Checks that a model has an embedding for every token of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuna.data.tokenization import TokenizedGroup

__all__ = ["check_tokens", "check_vocabulary", "vocabulary_of"]

SHOWN = 3  # records named


def vocabulary_of(model: nn.Module) -> int:
    """Number of tokens the model can read and write: the rows of its embeddings, or of its head if fewer."""
    rows = []
    for layer, name in (("get_input_embeddings", "num_embeddings"), ("get_output_embeddings", "out_features")):
        found: Any = getattr(model, layer)()
        size = getattr(found, name, None)  # not the weight's size: ZeRO-3 shards the weight, 4 bits packs it
        if isinstance(size, int):
            rows.append(size)
    config: Any = model.config
    return min(rows) if rows else int(config.get_text_config().vocab_size)


def check_vocabulary(
    model: nn.Module, groups: Sequence[TokenizedGroup], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Reject records with tokens for which the model has no embedding; a larger tokenizer alone is fine.

    Raises:
        ValueError: names both sizes, such a token, and the records.
    """
    size = vocabulary_of(model)
    wrong: dict[str, int] = {}
    for item in groups:
        parts = [item.group.prompt, *item.group.responses]
        most = max((int(max(part)) for part in parts if len(part)), default=0)
        if most >= size:
            wrong[item.id] = most
    if wrong:
        raise ValueError(f"{_beyond(size, next(iter(wrong.values())), tokenizer)}; used by {_named(list(wrong))}")


def check_tokens(model: nn.Module, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None, name: str) -> None:
    """As `check_vocabulary`, for one text; `name` names it in the error."""
    size = vocabulary_of(model)
    if ids and max(ids) >= size:
        raise ValueError(f"{_beyond(size, max(ids), tokenizer)}; used by {name}")


def _beyond(size: int, token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    spelled = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
    holder = "the tokenizer has more tokens" if tokenizer is None else f"the tokenizer has {len(tokenizer):,} tokens"
    return (
        f"{holder}, the model {size:,} embeddings, none for token {token}{spelled}: resize them "
        "(model.resize_token_embeddings(len(tokenizer))) or use the model's own tokenizer"
    )


def _named(records: Sequence[str]) -> str:
    shown = ", ".join(map(repr, records[:SHOWN]))
    more = len(records) - SHOWN
    return f"record{'s' * (len(records) > 1)} {shown}" + (f" and {more:,} more" if more > 0 else "")
