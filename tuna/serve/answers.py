"""Conversion of rows of tokens to the formats of the OpenAI API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuna.models.decoding import Row, TopTokens, answer_text, prompt_logprobs
from tuna.serve.token_bytes import token_bytes, token_text

REPLACEMENT = "\ufffd"  # an incomplete character decodes to this


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of an answer and their text: a chunk of a stream or the whole answer.

    Attributes:
        text: the text they add.
        ids, logprobs, top: the tokens; the log-probability is None for a prompt's first token.
        offsets: start of each token in the whole text; for a later part of a character, the start of the character.
    """

    text: str
    ids: list[int]
    logprobs: list[float | None]
    top: list[TopTokens | None]
    offsets: list[int]


NOTHING = Part("", [], [], [], [])


def part_of(row: Row, tokenizer: PreTrainedTokenizerBase, *, since: int = 0, sent: int = 0, shift: int = 0) -> Part:
    """The tokens of `row` from index `since`, after `sent` characters of its text.

    `shift`, the length of an echoed prompt, is added to the offsets.
    """
    text = row.text if row.finish_reason is not None or row.sampling.stop else answer_text(row, tokenizer)
    offsets = [_end(answer_text(row, tokenizer, n), text) + shift for n in range(since, len(row.ids))]
    return Part(text[sent:], row.ids[since:], [*row.logprobs[since:]], [*row.top[since:]], offsets)


def echo_part(model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, top: int | None) -> Part:
    """An echoed prompt, with its tokens and their log-probabilities if `top` is not None."""
    if top is None:
        return Part(text, [], [], [], [])
    logprobs, likeliest = prompt_logprobs(model, ids, top)
    return Part(text, ids, logprobs, likeliest, [_end(_text(tokenizer, ids[:n]), text) for n in range(len(ids))])


def joined(first: Part, second: Part) -> Part:
    """The concatenation of two parts."""
    return Part(
        first.text + second.text,
        first.ids + second.ids,
        first.logprobs + second.logprobs,
        first.top + second.top,
        first.offsets + second.offsets,
    )


class Unsent:
    """The part of a row that has not been streamed yet.

    Text that may be the beginning of a stop text or of an incomplete character is held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shift: int) -> None:
        self.tokenizer, self.shift = tokenizer, shift
        self.tokens = self.characters = 0

    def take(self, row: Row) -> Part | None:
        """The next chunk, or None while text must be held back."""
        if row.finish_reason is None:
            text = row.text if row.sampling.stop else answer_text(row, self.tokenizer)
            if text.endswith(REPLACEMENT) or any(_overlap(text, stop) for stop in row.sampling.stop):
                return None
        part = part_of(row, self.tokenizer, since=self.tokens, sent=self.characters, shift=self.shift)
        self.tokens += len(part.ids)
        self.characters += len(part.text)
        return part


def completion_logprobs(part: Part, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The `logprobs` of a completion's choice."""
    names = [token_text(tokenizer, token) for token in part.ids]
    top: list[dict[str, float] | None] = []
    for name, value, likeliest in zip(names, part.logprobs, part.top, strict=True):
        if likeliest is None or value is None:
            top.append(None)
            continue
        found: dict[str, float] = {}
        for token, logprob in likeliest:
            found.setdefault(token_text(tokenizer, token), logprob)
        top.append(found | {name: value} if likeliest else {})
    return {"tokens": names, "token_logprobs": part.logprobs, "top_logprobs": top, "text_offset": part.offsets}


def chat_logprobs(part: Part, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The `logprobs` of a chat completion's choice."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        name, raw = token_text(tokenizer, token), token_bytes(tokenizer, token)
        return {"token": name, "logprob": logprob, "bytes": list(raw)}

    content = [
        entry(token, value) | {"top_logprobs": [entry(*pair) for pair in likeliest or ()]}
        for token, value, likeliest in zip(part.ids, part.logprobs, part.top, strict=True)
    ]
    return {"content": content, "refusal": None}


def usage(prompt_tokens: int, rows: list[Row]) -> dict[str, int]:
    """The `usage` of an answer: tokens of the prompts, each counted once, and of the answers, end tokens included."""
    answered = sum(len(row.ids) for row in rows)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answered,
        "total_tokens": prompt_tokens + answered,
    }


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end(beginning: str, text: str) -> int:
    """Where the first tokens of `text`, which decode to `beginning`, end in it; only complete characters count."""
    while beginning.endswith(REPLACEMENT) and not text.startswith(beginning):
        beginning = beginning[:-1]
    return min(len(beginning), len(text))


def _overlap(text: str, stop: str) -> bool:
    """Whether the end of `text` is a beginning of `stop`."""
    return any(text.endswith(stop[:n]) for n in range(1, len(stop)))
