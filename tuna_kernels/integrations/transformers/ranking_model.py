"""A module that owns a causal LM, so that wrappers (DDP, FSDP, DeepSpeed) see every use of its weights.

These wrappers act when the module they wrap is *called*: they gather the weights, set up the
reduction of gradients, and hook the returned tensors. The losses here use the LM head's weight
outside its own forward and never call the model's forward, so they have to run inside the wrapped call::

    engine, *_ = deepspeed.initialize(model=RankingModel(llm), ...)
    engine.backward(model_ranking_loss(engine, tree).loss)

`score_groups`, `model_ranking_loss` and `two_phase_ranking_loss` take a `RankingModel`, or any wrapper around one,
wherever they take a model. The wrapped call gets a `ModelRequest` and returns a plain tuple of tensors, the only form
in which every wrapper finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

__all__ = ["ModelRequest", "RankingModel"]


class ModelRequest(Protocol):
    """Something to compute with a bare causal LM, in one call."""

    def __call__(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Compute it. `model` is a transformers or peft model with complete weights."""
        ...


Carrier: TypeAlias = Callable[[ModelRequest], tuple[Tensor, ...]]
"""Executes requests through the wrappers of the model."""


class RankingModel(nn.Module):
    """Owns a causal LM and executes requests on it.

    Args:
        model: a transformers causal LM, or a peft model around one. Its parameters are named `model.…`; save it by
            `ranking_model.model.save_pretrained(folder)`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """The LM's configuration, from which engines read sizes."""
        return self.model.config

    def forward(self, request: ModelRequest) -> tuple[Tensor, ...]:
        """The tensors computed by the request with the LM."""
        return request(self.model)


def carrier(model: nn.Module | Carrier) -> Carrier:
    """The module itself if it contains a `RankingModel`, else a direct call on `model`."""
    if not isinstance(model, nn.Module) or any(isinstance(part, RankingModel) for part in model.modules()):
        return model
    bare = model
    return lambda request: request(bare)
