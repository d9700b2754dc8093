"""The bytes and the text of a single token; a part of a character has bytes but no text."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["token_bytes", "token_text"]

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a byte


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes a token adds to a text, possibly only part of a character."""
    kinds = _decoders(tokenizer)
    if token not in tokenizer.added_tokens_decoder:  # added ones are text
        piece: Any = tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str):
            if "ByteLevel" in kinds and all(character in _bytes_of() for character in piece):
                return bytes(_bytes_of()[character] for character in piece)
            if "ByteFallback" in kinds and (found := BYTE_PIECE.fullmatch(piece)):
                return bytes([int(found[1], 16)])
    return token_text(tokenizer, token).encode()


@lru_cache(maxsize=1 << 15)
def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text, special tokens by name. Decoded after a copy of itself, so that a leading space is kept."""
    once, twice = (_decode(tokenizer, [token] * count) for count in (1, 2))
    return twice[len(once) :] if twice.startswith(once) and len(twice) > len(once) else once


@lru_cache(maxsize=8)
def _decoders(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The decoder types of a tokenizer; a slow one names bytes like SentencePiece."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return frozenset(["ByteFallback"])
    state = json.loads(backend.decoder.__getstate__())
    return frozenset(part["type"] for part in state.get("decoders", [state]))


@lru_cache(maxsize=1)
def _bytes_of() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
