"""Answers constrained to a JSON schema: the allowed next tokens, computed by the library `llguidance`."""

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
    """The state of one constrained answer: which tokens may follow. Made by `json_constraint`, one per row."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether no further token is allowed."""
        return bool(self._matcher.is_stopped())

    def allowed(self, vocabulary: int) -> Tensor:
        """[vocabulary] bool: the tokens that may come next."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        mask[: min(vocabulary, len(bits))] = torch.from_numpy(bits[:vocabulary].astype(bool))
        return mask

    def accept(self, token: int) -> None:
        """Advance by `token`, which must be allowed."""
        self._matcher.consume_token(token)


def json_constraint(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], schema: Mapping[str, Any]) -> Constraint:
    """A constraint to JSON documents valid under a schema, without white space between their parts.

    Args:
        tokenizer: a fast tokenizer.
        ends: tokens that may end the answer once the document is complete.
        schema: the JSON schema.

    Raises:
        ValueError: an invalid or unsupported schema; a slow tokenizer.
        ModuleNotFoundError: `llguidance` is not installed.
    """
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(dict(schema), defaults={"whitespace_flexible": False})
    wrapped = _wrapped(tokenizer, tuple(ends))
    if problem := LLMatcher.validate_grammar(grammar, wrapped):
        raise ValueError(f"JSON schema not supported: {problem}")
    return Constraint(LLMatcher(wrapped, grammar))


@lru_cache(maxsize=4)
def _wrapped(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> Any:
    """The tokenizer in llguidance's form; takes about a second for a large vocabulary."""
    from llguidance.hf import from_tokenizer

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("JSON schemas need a fast tokenizer (of the library `tokenizers`)")
    return from_tokenizer(tokenizer, eos_token=list(ends))
