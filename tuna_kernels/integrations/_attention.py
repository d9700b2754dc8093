"""The tree inside transformers' attention layers, through its two public registries and nothing else.

A pass over a tree calls the backbone with one more keyword, ``tuna_tree``; transformers hands keywords of
``model.forward`` on to every attention call, where the registered function finds it. So a layer that
activation checkpointing computes again, long after the call, still has its tree, and nothing is kept on the
model.

Calls without a tree (ordinary forwards, generation) go to transformers' own SDPA function and mask function.

While a tree pass is under way the registered mask function builds no mask. It checks that the mask a layer
would have got has the form we compute (causal, or causal within a window) and notes the window; the attention
function notes the windows that layers apply. A window that only one side knows of is an error, not a wrong
number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface

from tuna_kernels.attention import tree_attention
from tuna_kernels.integrations._shared_keys import KeyRole

NAME = "tuna_tree"
"""What the attention implementation is called in `model.set_attn_implementation`."""

_REFUSED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "additive position biases",
    "cache": "a paged cache",
    "indices": "sparse attention over chosen keys",
    "block_indices": "sparse attention over chosen keys",
}


@dataclass(eq=False)
class TreePass:
    """One pass of a backbone over a packed tree.

    Attributes:
        subtree_end: [T] int64 on the model's device.
        position_ids: [T] int64, depth in the tree.
        backend: for `tree_attention`.
        asked: windows of the masks the model asked for (None: no window, or one longer than every sequence).
        applied: windows that attention layers asked us to apply.
        query_rows: [Tq] rows that this pass computes, the last ones of the tree; None: all.
        role: what to do with each layer's keys and values; None: nothing.
    """

    subtree_end: Tensor
    position_ids: Tensor
    backend: str
    query_rows: Tensor | None = None
    role: KeyRole | None = None
    asked: set[int | None] = field(default_factory=set)
    applied: set[int | None] = field(default_factory=set)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence in the tree."""
        with _disable_current_modes():  # the tree is real where the model is simulated with fake tensors
            return int(self.position_ids.max()) + 1

    def window(self, window: int | None) -> int | None:
        """The window, or None where no sequence is long enough to notice it."""
        if window is None or window >= len(self.position_ids) or window >= self.longest:
            return None
        return int(window)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """While the backbone runs; checks afterwards that masks and layers agreed about windows."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
        if not self.applied:
            raise ValueError(
                "no attention layer of the model received the tree: its layers do not hand keyword arguments on, so "
                "tuna_tree cannot serve it"
            )
        if self.asked and (differ := (self.asked ^ self.applied) - {None}):
            raise ValueError(
                f"sliding window {sorted(w for w in differ if w)}: the model's masks ask for {self.asked}, its "
                f"attention layers for {self.applied}; tuna_tree cannot tell which layer has which"
            )


_current: ContextVar[TreePass | None] = ContextVar("tuna_tree_pass", default=None)


def register() -> None:
    """Make ``"tuna_tree"`` known to transformers. Safe to repeat."""
    # Compiled layers call it as it is: what it notes on the tree and keeps for later passes is no part of a graph.
    AttentionInterface.register(NAME, torch.compiler.disable(tuna_tree_attention))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(NAME, tuna_tree_mask)


def tuna_tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    tuna_tree: TreePass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query [B, Hq, T, d], key and value [B, Hkv, T, d] -> [B, T, Hq, d]."""
    if tuna_tree is None:
        if _current.get() is not None:
            raise ValueError(
                f"{type(module).__name__} did not receive the tree: the model does not hand keyword arguments on to "
                "all its attention layers, so tuna_tree cannot serve it"
            )
        if softcap is not None:
            return _softcapped(module, query, key, value, attention_mask, dropout, scaling, softcap), None
        stock: Callable[..., tuple[Tensor, Tensor | None]] = AttentionInterface()["sdpa"]  # type: ignore[no-untyped-call]
        return stock(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            **kwargs,
        )
    _refuse(module, attention_mask, dropout, is_causal, kwargs)
    window = tuna_tree.window(sliding_window)
    first_run = _current.get() is tuna_tree  # else checkpointing computes the layer again
    if first_run:
        tuna_tree.applied.add(window)
    if tuna_tree.role is not None:
        key, value = tuna_tree.role(module, key, value, first_run)
    query_rows = tuna_tree.query_rows
    out = tree_attention(
        query,
        key,
        value,
        tuna_tree.subtree_end.to(query.device),
        query_rows=None if query_rows is None else query_rows.to(query.device),
        position_ids=tuna_tree.position_ids.to(query.device),
        window=window,
        scale=scaling,
        softcap=softcap,
        backend=tuna_tree.backend,
    )
    return out.transpose(1, 2).contiguous(), None


def _refuse(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    layer = type(module).__name__
    if dropout > 0:
        raise ValueError(
            f"attention dropout = {dropout} in {layer}: a shared prompt would draw it once, separate sequences once "
            "each; set it to 0 in the model's config (attention_dropout or attn_pdrop) or call model.eval()"
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{layer} uses {what} ({name}), which tuna_tree does not compute")
    if attention_mask is not None:
        raise ValueError(f"{layer} brings an attention mask of its own, which tuna_tree would have to ignore")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{layer} is bidirectional (is_causal is False); tuna_tree is causal attention")


def tuna_tree_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask function: none for a tree pass, after a look at the form; else the mask of SDPA."""
    current = _current.get()
    if current is None:
        stock: Callable[..., Tensor | None] = AttentionMaskInterface()["sdpa"]  # type: ignore[no-untyped-call]
        return stock(*args, **kwargs)
    current.asked.add(current.window(_window_asked(kwargs["mask_function"], len(current.position_ids))))
    return None


def _window_asked(mask_function: Callable[..., Tensor], total: int) -> int | None:
    """The window w of a mask ``0 <= i - j < w`` over ``total`` plain rows, None for a causal one.

    transformers hands the form over as a function of indices, so it is read off the function's values: the
    last row gives w, and rows around every place where another form (chunks, both directions) would differ
    are compared.

    Raises:
        ValueError: another form.
    """

    def row(i: int) -> Tensor:
        zero = torch.tensor(0)
        return mask_function(zero, zero, torch.tensor(i), torch.arange(total)).expand(total)

    with _disable_current_modes():  # values are needed, also where the model is simulated with fake tensors
        window = int(row(total - 1).sum())
        probes = {0, 1, total // 3, total // 2, window - 1, window, window + 1, total - 1}
        keys = torch.arange(total)
        for i in sorted(p for p in probes if 0 <= p < total):
            if not torch.equal(row(i), (keys <= i) & (keys > i - window)):
                raise ValueError(
                    "the model asks for a mask that is neither causal nor causal within a sliding window (chunked, "
                    f"bidirectional or its own): its row {i} of {total} differs; tuna_tree does not compute it"
                )
    return None if window >= total else window


def _softcapped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Plain attention with capped scores, which SDPA lacks: the arithmetic of transformers' eager functions."""
    heads = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
    rows, columns = scores.shape[-2:]
    if attention_mask is None and rows > 1:  # SDPA's mask function left the mask out: it is plainly causal
        attention_mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        # not -inf: a row of padding may see nothing at all, and must not turn into NaN
        scores = scores.masked_fill(~attention_mask[..., :columns], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous()
