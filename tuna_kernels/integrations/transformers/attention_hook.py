"""Trees in transformers' attention layers, through its two public registries only.

The tree is passed as the attention mask. During a pass over a tree the registered mask function builds no
mask: it checks that the layer's mask would have a supported form (causal, or causal within a window) and
returns a `TreeMask`, the tree with that window. Every decoder layer passes its mask on to its attention, even if it
drops other keywords, and a layer that activation checkpointing recomputes after the call still has it. Nothing is
stored on the model.

Calls without a tree (ordinary forwards, generation) use the model's original attention: transformers' SDPA
or the eager function of the model's own file, according to the name of the implementation.

A model whose attention is not in the registry gets the tree as a dense mask (`dense_mask`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface

from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.integrations.transformers import row_numbers
from tuna_kernels.integrations.transformers.shared_keys import KeyRole

SDPA, EAGER, DENSE = "tuna_tree", "tuna_tree_eager", "tuna_tree_dense"
"""Names of the implementation in a model's configuration: ordinary calls use SDPA; or the eager function of
the model's file; or the model keeps its own attention and gets the tree as a dense mask."""

OWN_ATTENTION = (
    "the model has its own attention, not one from transformers' registry: two phases need its keys and values, so use "
    "the one-pass loss"
)

_REFUSED = {
    "position_bias": "additive position biases",
    "cache": "a paged cache",
    "indices": "sparse attention over selected keys",
    "block_indices": "sparse attention over selected keys",
}


@dataclass(eq=False)
class TreePass:
    """One pass of a backbone over a packed tree.

    Attributes:
        subtree_end: [T] int64 on the model's device.
        position_ids: [T] int64, depth in the tree.
        backend: for `tree_attention`.
        query_rows: [Tq] rows computed by this pass, the last ones of the tree; None: all.
        role: what to do with each layer's keys and values; None: nothing.
        reached: number of attention layers that received the tree, or masks built from it.
    """

    subtree_end: Tensor
    position_ids: Tensor
    backend: str
    query_rows: Tensor | None = None
    role: KeyRole | None = None
    reached: int = 0

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence in the tree."""
        with _disable_current_modes():  # the tree is real even if the model's tensors are fake
            return int(self.position_ids.max()) + 1

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Context of the backbone's forward; checks at exit that its attention received the tree."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
        if not self.reached:
            raise ValueError(
                "no attention layer received the tree: the model does not create its masks by transformers' mask "
                "functions, so the tree cannot reach it"
            )

    def dense_mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[1, 1, T, T]: 0 where a row sees another, the lowest number of `dtype` elsewhere."""
        rows, depth = torch.arange(len(self.position_ids), device=device), self.position_ids.to(device)
        seen = (rows <= rows[:, None]) & (rows[:, None] < self.subtree_end.to(device))
        if window is not None:
            seen &= depth[:, None] - depth < window
        lowest = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, lowest)[None, None]


@dataclass(eq=False)
class TreeMask:
    """What a layer gets as its attention mask.

    Attributes:
        tree: the tree.
        window: the layer's window, as in `tree_attention`.
        refused: why a layer that uses this mask is not supported. Models also create masks that no layer uses.
    """

    tree: TreePass
    window: int | None = None
    refused: str = ""


_current: ContextVar[TreePass | None] = ContextVar("tuna_tree_pass", default=None)


def current_pass() -> TreePass | None:
    """The pass in progress, or None."""
    return _current.get()


def register() -> None:
    """Register our implementations with transformers. Safe to repeat."""
    # Not compiled: the tensors it keeps for later passes must not be part of a compiled graph.
    AttentionInterface.register(SDPA, torch.compiler.disable(_attend_or_sdpa))  # type: ignore[no-untyped-call]
    AttentionInterface.register(EAGER, torch.compiler.disable(_attend_or_eager))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(SDPA, _tree_or_sdpa_mask)
    AttentionMaskInterface.register(EAGER, _tree_or_eager_mask)
    AttentionMaskInterface.register(DENSE, _dense_or_eager_mask)


def _attend_or_sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(module, AttentionInterface()["sdpa"], *args, **kwargs)  # type: ignore[no-untyped-call]


def _attend_or_eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(module, _eager(module), *args, **kwargs)


def _attend(
    module: nn.Module,
    stock: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | TreeMask | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query [B, Hq, T, d], key and value [B, Hkv, T, d] -> [B, T, Hq, d]."""
    if not isinstance(attention_mask, TreeMask):
        if _current.get() is not None:
            raise ValueError(
                f"{type(module).__name__} did not receive the tree: it does not get the mask that transformers' mask "
                "functions create, so the tree cannot reach it"
            )
        return stock(module, query, key, value, attention_mask, **kwargs)
    if attention_mask.refused:
        raise ValueError(f"{type(module).__name__}: {attention_mask.refused}")
    _refuse(module, **kwargs)
    tree = attention_mask.tree
    first_run = _current.get() is tree  # else checkpointing is recomputing the layer
    tree.reached += first_run
    query = row_numbers.corrected(module, query, tree.position_ids, tree.query_rows)
    if tree.role is not None:
        key, value = tree.role(module, key, value, first_run)
    query_rows = tree.query_rows
    with row_numbers.ours():
        out = tree_attention(
            query,
            key,
            value,
            tree.subtree_end.to(query.device),
            query_rows=None if query_rows is None else query_rows.to(query.device),
            position_ids=tree.position_ids.to(query.device),
            window=attention_mask.window,
            scale=kwargs.get("scaling"),
            softcap=kwargs.get("softcap"),
            sinks=_sinks(module, kwargs),
            backend=tree.backend,
        )
    return out.transpose(1, 2).contiguous(), None


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention function in the file of the layer's class or of one of its base classes."""
    for kind in type(module).__mro__:
        found: Callable[..., Any] | None = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(f"{type(module).__name__} has no eager attention function in its file")


def _refuse(module: nn.Module, *, dropout: float = 0.0, **kwargs: Any) -> None:
    layer = type(module).__name__
    if dropout > 0:
        raise ValueError(
            f"attention dropout = {dropout} in {layer}: it would be drawn once for a shared prompt, but once per "
            "separate sequence; set it to 0 in the config (attention_dropout or attn_pdrop) or call model.eval()"
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{layer} uses {what} ({name}), which tuna_tree does not support")


def _sinks(module: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """[Hq] learned logits in the denominator, under either of their keyword names."""
    sinks: Tensor | None = kwargs.get("s_aux", kwargs.get("sinks"))
    if sinks is not None and sinks.ndim != 1:
        raise ValueError(
            f"{type(module).__name__} has attention sinks of shape {list(sinks.shape)}; only one learned number per "
            "head is supported"
        )
    return sinks


def _tree_or_sdpa_mask(**kwargs: Any) -> Tensor | TreeMask | None:
    return _tree_mask("sdpa", kwargs)


def _tree_or_eager_mask(**kwargs: Any) -> Tensor | TreeMask | None:
    return _tree_mask("eager", kwargs)


def _tree_mask(stock: str, kwargs: dict[str, Any]) -> Tensor | TreeMask | None:
    """transformers' mask function: during a pass the tree, after a check of the mask's form; else the stock mask."""
    if (current := _current.get()) is None:
        return _stock_mask(stock, kwargs)
    try:
        return TreeMask(current, _window_asked(kwargs["mask_function"], current.longest))
    except ValueError as error:
        return TreeMask(current, refused=str(error))


def _dense_or_eager_mask(**kwargs: Any) -> Tensor | None:
    if (current := _current.get()) is None:
        return _stock_mask("eager", kwargs)
    if current.role is not None:
        raise ValueError(OWN_ATTENTION)
    current.reached += 1
    window = _window_asked(kwargs["mask_function"], current.longest)
    with row_numbers.ours():
        return current.dense_mask(window, kwargs["dtype"], torch.device(kwargs["device"]))


def _stock_mask(name: str, kwargs: dict[str, Any]) -> Tensor | None:
    function: Callable[..., Tensor | None] = AttentionMaskInterface()[name]  # type: ignore[no-untyped-call]
    return function(**kwargs)


def _window_asked(mask_function: Callable[..., Tensor], longest: int) -> int | None:
    """The window w of a mask `0 <= i - j < w` over sequences of up to `longest` tokens, None for a causal mask.

    transformers passes a function of indices, so the form is inferred from its values: the
    last row gives w, and rows around every place where another form (chunks, bidirectional) would differ
    are compared.

    Raises:
        ValueError: another form.
    """

    def row(i: int) -> Tensor:
        zero = torch.tensor(0)
        return mask_function(zero, zero, torch.tensor(i), torch.arange(longest)).expand(longest)

    with _disable_current_modes(), row_numbers.ours():  # real values, even if the model's tensors are fake
        window = int(row(longest - 1).sum())
        probes = {0, 1, longest // 3, longest // 2, window - 1, window, window + 1, longest - 1}
        keys = torch.arange(longest)
        for i in sorted(p for p in probes if 0 <= p < longest):
            if not torch.equal(row(i), (keys <= i) & (keys > i - window)):
                raise ValueError(
                    "the model uses a mask that is neither causal nor causal within a sliding window (chunked, "
                    f"bidirectional or custom): row {i} of {longest} differs; tuna_tree does not support it"
                )
    return None if window >= longest else window
