"""Laws of the bytes of tokens: joined they are the text's, whatever the tokenizer cuts characters into."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tuna.models.decoding import Decoding, Row
from tuna.models.loading import load_tokenizer
from tuna.serve.answers import Part, chat_logprobs, part_of
from tuna.serve.token_bytes import token_bytes, token_text

TEXT = "a🦊b é\u200d日 the\n"


def sentencepiece() -> Any:
    """As Llama 2's: spaces as ▁, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abehtn", "th", "▁th", "▁the"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level() -> Any:
    return load_tokenizer("tiny")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_joined_bytes_are_the_texts(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == TEXT.encode()
    fox = tokenizer("🦊", add_special_tokens=False)["input_ids"]
    assert [token_bytes(tokenizer, token) for token in fox] == [bytes([byte]) for byte in "🦊".encode()]
    assert token_bytes(tokenizer, tokenizer.eos_token_id) == b"</s>"
    tokenizer.add_tokens(["<think>", "<|日|>"])
    for added in ("<think>", "<|日|>"):
        assert token_bytes(tokenizer, tokenizer.convert_tokens_to_ids(added)) == added.encode()


def test_a_leading_space_belongs_to_its_token() -> None:
    tokenizer = sentencepiece()
    assert token_text(tokenizer, tokenizer.convert_tokens_to_ids("▁the")) == " the"
    assert token_text(tokenizer, tokenizer.convert_tokens_to_ids("th")) == "th"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_chat_entries_and_their_alternatives_have_raw_bytes(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer("🦊", add_special_tokens=False)["input_ids"]
    part = Part("🦊", ids, [-1.0] * 4, [[(ids[0], -1.0), (ids[1], -2.0)]] * 4, [0] * 4)
    content = chat_logprobs(part, tokenizer)["content"]
    assert [entry["bytes"] for entry in content] == [[240], [159], [166], [138]]
    assert [[other["bytes"] for other in entry["top_logprobs"]] for entry in content] == [[[240], [159]]] * 4


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_offsets_of_pieces_are_those_of_their_character(make: Any) -> None:
    tokenizer = make()
    text = "a🦊b🦊"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = Row(ids[:1], Decoding(max_tokens=99), frozenset())
    row.ids, row.logprobs, row.top = ids, [-1.0] * len(ids), [[] for _ in ids]
    row.text, row.finish_reason = text, "length"
    assert part_of(row, tokenizer, shift=5).offsets == [5, 6, 6, 6, 6, 7, 8, 8, 8, 8]
