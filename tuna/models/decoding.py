"""Batched sampling from a causal language model: several prompts at once, with separate settings per row.

`transformers.generate` has one temperature, one seed and one stop list per batch. Here every row has its own, and its
own random number generator, so the random numbers of a row depend on its seed only. (Its logits depend on the rest of
the batch in the last bits: matrix products of another size may sum in another order. The same seed in the same batch
gives identical text, and almost always in other batches too.)

Prompts are padded on the left, so that the last column holds the newest token of every row. A prompt that occurs
several times is computed once and its cache rows are copied. A finished row is removed from the batch and the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from tuna.data.templates import end_token_id
from tuna.models.constrained import Constraint

__all__ = [
    "Decoding",
    "Finish",
    "Row",
    "TopTokens",
    "answer_text",
    "end_tokens",
    "generate",
    "position_limit",
    "prompt_logprobs",
]

Finish: TypeAlias = Literal["stop", "length", "cancelled"]
TopTokens: TypeAlias = list[tuple[int, float]]
TAIL = 4  # prompt tokens decoded along with an answer, so that the tokenizer keeps its leading space
CHUNK = 128  # prompt tokens whose logits are held at once


@dataclass(frozen=True)
class Decoding:
    """Decoding parameters of one answer.

    Attributes:
        max_tokens: maximum number of tokens, end token included.
        temperature: 0 is greedy decoding.
        top_p: sample from the most likely tokens with this cumulative probability.
        seed: of this row's random number generator.
        stop: texts that end the answer; they are not part of it.
        top_logprobs: number of most likely tokens to report per position.

    Raises:
        ValueError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | tuple[int, ...] = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be finite and at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1")
        if "" in self.stop:
            raise ValueError("stop contains an empty text, which would end every answer at once")
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs = {self.top_logprobs} must be at least 0")


@dataclass
class Row:
    """One answer, in progress or finished.

    Log-probabilities (nats) are the model's, before temperature, top-p and constraint; the end token has one too.

    Attributes:
        prompt: token ids of the prompt.
        sampling: sampling parameters.
        ends: tokens that end the answer.
        ids, logprobs, top: tokens so far, their log-probabilities, and the most likely tokens at each position.
        finish_reason: None while in progress.
        text: the answer without stop text and end token; before the end it is updated only for rows with a stop text.
        constraint: a constraint on the answer, or None.
    """

    prompt: Sequence[int]
    sampling: Decoding
    ends: frozenset[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopTokens] = field(default_factory=list)
    finish_reason: Finish | None = None
    text: str = ""
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt has no tokens")
        self.random = np.random.default_rng(self.sampling.seed)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    on_token: Callable[[Row], bool] = lambda row: True,
) -> None:
    """Sample the answers of all rows as one batch, in place, in evaluation mode.

    Args:
        model: a causal language model that supports left padding (all decoder families of transformers do).
        tokenizer: its tokenizer.
        rows: the answers to sample.
        on_token: called with a row after each of its tokens, the last included; returning False cancels the row.

    Raises:
        ValueError: a row exceeds the positions of the model.
    """
    limit = position_limit(model)
    for row in rows:
        if limit is not None and len(row.prompt) + row.sampling.max_tokens > limit:
            raise ValueError(
                f"{len(row.prompt)} prompt tokens and max_tokens = {row.sampling.max_tokens} exceed the "
                f"{limit} positions of the model"
            )
    torch.nn.Module.eval(model)
    live = list(rows)
    with torch.inference_mode():
        if not live:
            return
        state, logits = _prefill(model, live)
        while True:
            _extend(live, logits, tokenizer, on_token)
            going = [i for i, row in enumerate(live) if row.finish_reason is None]
            if not going:
                return
            if len(going) < len(live):
                live = [live[i] for i in going]
                state.keep(going)
            logits = state.step([row.ids[-1] for row in live])


def prompt_logprobs(
    model: PreTrainedModel, ids: Sequence[int], top: int = 0
) -> tuple[list[float | None], list[TopTokens | None]]:
    """Log-probability of every token of a text (None for the first), and the most likely tokens at each position.

    Logits are held for `CHUNK` tokens at a time, never for the whole text.
    """
    torch.nn.Module.eval(model)
    logprobs: list[float | None] = [None]
    likeliest: list[TopTokens | None] = [None]
    tokens = torch.tensor([list(ids)], device=model.device)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, CHUNK):
            part = tokens[:, start : min(start + CHUNK, len(ids) - 1)]
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            found = _log_softmax(out.logits[0])
            targets = tokens[0, start + 1 : start + 1 + part.shape[1]]
            logprobs += found.gather(1, targets[:, None])[:, 0].tolist()
            likeliest += _likeliest(found, [top] * len(found))
    return logprobs, likeliest


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> frozenset[int]:
    """Tokens that end an answer: the end-of-text tokens of model and tokenizer, with `chat` also the end of turn."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ends = {given} if isinstance(given, int) else set(given or ())
    for template in ("none", "chat") if chat else ("none",):
        ends.add(end_token_id(tokenizer, template))
    return frozenset(ends)


def position_limit(model: PreTrainedModel) -> int | None:
    """Maximum number of tokens of prompt and answer together, None if the model has no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


class _State:
    """Keys and values of the unfinished rows, and the attention mask over their columns."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor) -> None:
        self.model, self.cache, self.mask = model, cache, mask

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row named twice is copied. Columns masked for all rows are kept."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run one more token of each row; returns the logits [rows, V] of the next."""
        column = torch.tensor(tokens, device=self.mask.device)[:, None]
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(column)], 1)
        return _forward(self.model, column, self.mask, positions, self.cache)


def _prefill(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[_State, Tensor]:
    """Run every distinct prompt once; returns the state and the logits [rows, V] of all rows."""
    places: dict[tuple[int, ...], int] = {}
    index = [places.setdefault(tuple(row.prompt), len(places)) for row in rows]
    longest = max(map(len, places))
    ids = torch.zeros(len(places), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(places):
        ids[place, longest - len(prompt) :] = torch.tensor(prompt)
        mask[place, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    state = _State(model, DynamicCache(config=model.config), mask)
    logits = _forward(model, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), state.cache)
    if index != list(range(len(places))):
        state.keep(index)
        logits = logits[torch.tensor(index, device=logits.device)]
    return state, logits


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    taken = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"position_ids": positions} if "position_ids" in taken else {}
    if "logits_to_keep" in taken:
        extra["logits_to_keep"] = 1
    out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
    logits: Tensor = out.logits[:, -1]
    return logits


def _extend(
    rows: Sequence[Row],
    logits: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    on_token: Callable[[Row], bool],
) -> None:
    """Sample the next token of every row from `logits` [rows, V], and finish rows that end."""
    found = _log_softmax(logits)
    chosen = _draw(_constrained(logits, rows), rows)
    values = found.gather(1, chosen[:, None])[:, 0].tolist()
    likeliest = _likeliest(found, [row.sampling.top_logprobs for row in rows])
    for row, token, value, top in zip(rows, chosen.tolist(), values, likeliest, strict=True):
        row.ids.append(token)
        row.logprobs.append(value)
        row.top.append(top)
        if row.constraint is not None:
            row.constraint.accept(token)
        _settle(row, tokenizer)
        if not on_token(row) and row.finish_reason is None:
            row.finish_reason = "cancelled"


def _settle(row: Row, tokenizer: PreTrainedTokenizerBase) -> None:
    """Finish the row if it has ended, and update its text if needed."""
    ended = row.ids[-1] in row.ends or (row.constraint is not None and row.constraint.complete)
    full = len(row.ids) >= row.sampling.max_tokens
    if ended or full:
        row.finish_reason = "stop" if ended else "length"
    elif not row.sampling.stop:
        return
    row.text = answer_text(row, tokenizer)
    cuts = [at for text in row.sampling.stop if (at := row.text.find(text)) >= 0]
    if cuts:
        row.finish_reason, row.text = "stop", row.text[: min(cuts)]
        # Tokens that consist of stop text only are not part of the answer either.
        count = next(n for n in range(len(row.ids) + 1) if len(answer_text(row, tokenizer, n)) >= len(row.text))
        del row.ids[count:], row.logprobs[count:], row.top[count:]


def answer_text(row: Row, tokenizer: PreTrainedTokenizerBase, count: int | None = None) -> str:
    """The text of a row's first `count` tokens (default: all), without special tokens."""
    tail = list(row.prompt[-TAIL:])
    ids = row.ids[:count]
    before, both = (_decode(tokenizer, tokens) for tokens in (tail, tail + ids))
    return both[len(before) :] if both.startswith(before) else _decode(tokenizer, ids)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _likeliest(logprobs: Tensor, counts: Sequence[int]) -> list[TopTokens]:
    """The `counts[i]` most likely tokens of row i of `logprobs` [rows, V], best first."""
    most = min(max(counts, default=0), logprobs.shape[-1])
    if most == 0:
        return [[] for _ in counts]
    values, tokens = (part.tolist() for part in logprobs.topk(most))
    return [list(zip(t[:n], v[:n], strict=True)) for t, v, n in zip(tokens, values, counts, strict=True)]


def _constrained(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """`logits` [rows, V] with the tokens excluded by a row's constraint masked."""
    held = [(i, row.constraint) for i, row in enumerate(rows) if row.constraint is not None]
    if not held:
        return logits
    logits = logits.clone()
    for i, constraint in held:
        logits[i].masked_fill_(~constraint.allowed(logits.shape[-1]).to(logits.device), -torch.inf)
    return logits


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """One token per row [rows], sampled by inverting the cumulative distribution in float64."""
    chosen = logits.argmax(-1)
    hot = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if not hot:
        return chosen
    options: dict[str, Any] = {"dtype": torch.float64, "device": logits.device}
    index = torch.tensor(hot, device=logits.device)
    temperature = torch.tensor([rows[i].sampling.temperature for i in hot], **options)[:, None]
    uniform = torch.tensor([rows[i].random.random() for i in hot], **options)[:, None]
    picked = logits[index].double()
    # Shift the largest logit to 0 first: a tiny temperature then gives -inf, never inf.
    weights = torch.softmax((picked - picked.amax(-1, keepdim=True)) / temperature, -1)
    top_p = torch.tensor([rows[i].sampling.top_p for i in hot], **options)[:, None]
    if (top_p < 1).any():
        ordered, places = weights.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the most likely token is never outside
        weights = weights.masked_fill(torch.zeros_like(outside).scatter(-1, places, outside), 0.0)
    cumulative = weights.cumsum(-1)
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    chosen[index] = token.clamp(max=logits.shape[-1] - 1)
    return chosen
