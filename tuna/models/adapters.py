"""Merging `peft` adapters into plain models, including tied embeddings."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

__all__ = ["merged"]


def merged(adapted: nn.Module) -> nn.Module:
    """Merge the adapter of a `peft` model into a plain model; `adapted` is modified and must not be used afterwards.

    In a tied model, head and embeddings share a matrix, but each may have its own adapter. If the merged matrices
    differ, the model is untied, with `tie_word_embeddings` false in its configuration; if they are equal, it stays
    tied.
    """
    wrapped: Any = adapted
    base = wrapped.get_base_model()
    was_tied = _tied(base)
    if was_tied:
        head = _plain_layer(base.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")  # untied above
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        plain: Any = wrapped.merge_and_unload()
    if was_tied or _says_tied(plain):
        _tie_or_say_untied(plain)
    return plain  # type: ignore[no-any-return]


def _tie_or_say_untied(model: Any) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None:
        return
    same = head.weight.shape == embeddings.weight.shape and torch.equal(head.weight, embeddings.weight)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = same
    if same:
        head.weight = embeddings.weight


def _tied(model: Any) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None:
        return False
    return getattr(_plain_layer(head), "weight", 0) is getattr(_plain_layer(embeddings), "weight", 1)


def _says_tied(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _plain_layer(module: Any) -> Any:
    """The original layer inside peft's wrappers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _plain_layer(module.original_module)
    return module
