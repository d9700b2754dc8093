"""Answers that keep to a JSON schema: which tokens may come next, by the library `llguidance`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = ["Constraint", "json_constraint"]


class Constraint:
    """What an answer under way may go on with. Made by `json_constraint`, one for each row."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether nothing may follow any more."""
        return bool(self._matcher.is_stopped())

    def allowed(self, vocabulary: int) -> Tensor:
        """[vocabulary] bool: the tokens that may come next."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        mask[: min(vocabulary, len(bits))] = torch.from_numpy(bits[:vocabulary].astype(bool))
        return mask

    def accept(self, token: int) -> None:
        """Go on with `token`, one that is allowed."""
        self._matcher.consume_token(token)


def json_constraint(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], schema: Mapping[str, Any]) -> Constraint:
    """A constraint to JSON documents that a schema allows, without white space between their parts.

    Args:
        tokenizer: a fast one.
        ends: tokens that may end the answer once the document is complete.
        schema: JSON schema.

    Raises:
        ValueError: no such schema, or one with parts that are not supported; a slow tokenizer.
        ModuleNotFoundError: `llguidance` is not installed.
    """
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(dict(schema), defaults={"whitespace_flexible": False})
    wrapped = _wrapped(tokenizer, tuple(ends))
    if problem := LLMatcher.validate_grammar(grammar, wrapped):
        raise ValueError(f"the JSON schema cannot be followed: {problem}")
    return Constraint(LLMatcher(wrapped, grammar))


@lru_cache(maxsize=4)
def _wrapped(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> Any:
    """The tokenizer as llguidance wants it; about a second for a large vocabulary."""
    from llguidance.hf import from_tokenizer

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("JSON schemas need a fast tokenizer (one of the library tokenizers)")
    return from_tokenizer(tokenizer, eos_token=list(ends))
