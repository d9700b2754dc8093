"""Models with their own attention, not in transformers' registry (GPT-J, GPT-Neo, Falcon, BLOOM, MPT, …).

They still use transformers' mask functions, so they get the tree as a mask of T x T numbers: the same scores and
gradients, each shared token computed once, with T**2 numbers of memory and at the speed of the model's own eager
attention. Two phases are not supported: the keys and values stay inside the layers.

What such layers count in rows is corrected or limited here:

* linear position biases (ALiBi) reach a layer as a table by row; a forward pre-hook of the layer replaces it
  by the table by depth;
* causal masks that a layer keeps as a buffer (GPT-Neo's local layers) limit the number of rows to those for which they
  are plain causal.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tuna_kernels.integrations.transformers.attention_hook import current_pass

_BIASES = ("alibi", "position_bias")

_by_depth: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The bias by depth for each bias by row seen, for layers that checkpointing recomputes."""

_most_rows: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def hook_biases(backbone: nn.Module) -> None:
    """Give the backbone's layers position biases by depth. Safe to repeat; calls without a tree are unchanged."""
    for layers in backbone.modules():
        if isinstance(layers, nn.ModuleList):
            for layer in layers:
                takes = inspect.signature(layer.forward).parameters
                if any(name in takes for name in _BIASES) and _bias_by_depth not in _hooks(layer):
                    layer.register_forward_pre_hook(_bias_by_depth, with_kwargs=True)


def _hooks(layer: nn.Module) -> list[Any]:
    return list(layer._forward_pre_hooks.values())


def _bias_by_depth(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for name in _BIASES:
        given = kwargs.get(name)
        if given is not None and (known := _exchanged(given)) is not None:
            return args, {**kwargs, name: known}
    return None


def _exchanged(given: Tensor) -> Tensor | None:
    if given in _by_depth:
        return _by_depth[given]  # type: ignore[no-any-return]
    if (tree := current_pass()) is None:
        return None
    if given.shape[-2] != 1:
        raise ValueError(f"a position bias of shape {list(given.shape)} differs between queries: not a linear bias")
    length, longest = given.shape[-1], tree.longest
    if length < longest:
        raise ValueError(f"a sequence of {longest} tokens exceeds the model's {length} positions")
    # Only differences matter in a softmax. Tables begin at 0 (BLOOM) or end there (MPT); stay near 0 for precision.
    begins = bool((given[..., 0] == 0).all())
    depth = tree.position_ids.to(given.device)
    found: Tensor = given[..., depth if begins else depth + (length - longest)]
    _by_depth[given] = found
    return found


def check_rows(base: nn.Module, rows: int) -> None:
    """Reject more packed rows than those for which the masks in the model's buffers are plain causal."""
    if base not in _most_rows:
        found = [_plain_rows(buffer) for buffer in base.buffers() if _is_mask(buffer)]
        _most_rows[base] = min(found, default=None)
    most = _most_rows[base]
    if most is not None and rows > most:
        raise ValueError(
            f"{rows} packed rows exceed {most}: {type(base).__name__} has masks by row (a local window, or the longest "
            "input), which are plain causal only up to there; pack fewer tokens into a row"
        )


def _is_mask(buffer: Tensor) -> bool:
    return buffer.ndim >= 2 and buffer.dtype in (torch.bool, torch.uint8) and buffer.shape[-1] == buffer.shape[-2] > 1


def _plain_rows(mask: Tensor) -> int:
    """Number of leading rows in which the mask is plain causal."""
    plain = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    same = (mask.bool() == plain).flatten(0, -3).all(0).all(-1) if mask.ndim > 2 else (mask.bool() == plain).all(-1)
    return int(same.long().cumprod(0).sum())
