"""A tokenizer's chat template: the text before and around an answer, and the token that ends it.

Training uses exactly what the template renders. The prompt is the conversation up to and including the generation
prompt; a response is everything from there to the end of the turn: a space or an empty think block before the answer,
the answer (stripped if the template strips it), the text between it and the end token, and the end token. A template
whose generation prompt differs from how it begins the assistant's turn cannot be split there and is rejected, as is
one that drops a turn or part of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "ChatTemplate", "special_text"]

ANSWER = "tuna probes an answer"  # no white space at its edges, nothing a template could take for markup
QUESTION = "tuna probes a question"
Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Answer:
    """A rendered response: what the template writes before its text, the text, and what comes after.

    `ended`: `after` ends with the end token, printed by the template; otherwise the end-of-sequence token follows.
    """

    before: str
    text: str
    after: str
    ended: bool

    @property
    def whole(self) -> str:
        """The three parts joined."""
        return self.before + self.text + self.after


def special_text(tokenizer: PreTrainedTokenizerBase, *, added: bool = False) -> re.Pattern[str]:
    """A pattern for text that spells a special token, or with `added` any token added to the vocabulary."""
    found = set(tokenizer.all_special_tokens)
    found |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special or added}
    longest_first = sorted(filter(None, found), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class ChatTemplate:
    """The chat template of a tokenizer, which must have one.

    Raises:
        ValueError: from `prompt` and `answers`: the template rejects the turns, drops some, or cannot be split.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._shown: set[tuple[str, ...]] = set()  # sequences of roles of which no turn is dropped

    def prompt(self, turns: Turns, name: str) -> str:
        """The conversation up to the beginning of the assistant's turn; `name` names the record in errors."""
        text = self._render(turns, name, generation=True)
        shown = _squeezed(text)
        for place, turn in enumerate(turns):
            if _squeezed(turn["content"]) not in shown:
                self._check_shown(turns, place, name)
        self._check_roles(turns, name)
        return text

    def answers(self, turns: Turns, prompt: str, responses: Sequence[str], name: str) -> list[Answer]:
        """Each response as the template writes it after `prompt`, up to and including the end token."""
        frame = self._usual
        found = []
        for number, response in enumerate(responses):
            rest = self._after(turns, prompt, response, name)
            if _squeezed(response) not in _squeezed(rest):
                raise ValueError(f"{name}: the chat template drops part of responses[{number}]")
            if frame is None or not _fits(rest, frame):
                frame = self._frame(self._after(turns, prompt, ANSWER, name))
            if frame is None:
                raise ValueError(f"{name}: the chat template changes answers so that they cannot be located")
            found.append(self._answer(rest, frame))
        return found

    @cached_property
    def end(self) -> str | None:
        """The text of the token that ends the assistant's turn: the first special token after an answer.

        A token that also ends the user's turn is preferred. Without a special token, the first token added to the
        vocabulary; None if a turn ends with plain text or with nothing. Text that appears only after the last turn of
        a conversation (`</s>` after `<|im_end|>`) is considered last.
        """
        try:
            last = self._render([*_ASKED, _said(ANSWER)], "", generation=False)
        except ValueError:  # `prompt` reports it
            return None
        head, found, last = last.rpartition(ANSWER)
        if not found:
            return None
        asked = head.rpartition(QUESTION)[2]
        places = [last]
        try:
            more = self._render([*_ASKED, _said(ANSWER), {"role": "user", "content": "more"}], "", generation=False)
            places.insert(0, _common(last, more.rpartition(ANSWER)[2]))
        except ValueError:  # a template for a single question
            pass
        for place in places:
            for added in (False, True):
                tokens = special_text(self.tokenizer, added=added).findall(place)
                if tokens:  # a token that also ends the user's turn ends a turn, not a part of one
                    return next((token for token in tokens if token in asked), str(tokens[0]))
        return None

    def answer_in(self, text: str) -> str:
        """The answer in generated text, without what the template writes around it."""
        if self._usual is None:
            return text
        before, after = (self._visible(part) for part in self._usual)
        if before and text.startswith(before):
            text = text[len(before) :]
        return text[: -len(after)] if after and text.endswith(after) else text

    def check(self) -> None:
        """Reject a template that cannot be split for any record; one that rejects the probe is checked per record.

        Raises:
            ValueError: the generation prompt differs from the beginning of the assistant's turn.
        """
        try:
            prompt = self._render(_ASKED, "", generation=True)
            whole = self._render([*_ASKED, _said(ANSWER)], "", generation=False)
        except ValueError:
            return
        if ANSWER in whole:
            _split(prompt, whole, "")

    @cached_property
    def _usual(self) -> tuple[str, str] | None:
        """The text before and after an answer to one question, None if it cannot be located."""
        try:
            return self._frame(self._after(_ASKED, self._render(_ASKED, "", generation=True), ANSWER, ""))
        except ValueError:
            return None

    def _frame(self, rest: str) -> tuple[str, str] | None:
        before, found, after = rest.partition(ANSWER)
        return (before, after) if found and ANSWER not in after else None

    def _answer(self, rest: str, frame: tuple[str, str]) -> Answer:
        before, after = frame
        if not rest.startswith(before):
            before = ""  # depends on the answer (which may have its own think block)
        if not rest.endswith(after) or len(rest) < len(before) + len(after):
            place = rest.rfind(self.end) if self.end else -1
            if self.end is None or place < len(before):
                return Answer(before, rest[len(before) :], "", False)
            return Answer(before, rest[len(before) : place], self.end, True)
        text = rest[len(before) : len(rest) - len(after)]
        place = after.find(self.end) if self.end else -1
        if self.end is None or place < 0:
            return Answer(before, text, after, False)
        return Answer(before, text, after[: place + len(self.end)], True)

    def _after(self, turns: Turns, prompt: str, response: str, name: str) -> str:
        return _split(prompt, self._render([*turns, _said(response)], name, generation=False), name)

    def _visible(self, text: str) -> str:
        """`text` as it appears in a decoded answer: up to the end token, without special tokens."""
        text = text.partition(self.end)[0] if self.end else text
        return special_text(self.tokenizer).sub("", text)

    def _check_shown(self, turns: Turns, place: int, name: str) -> None:
        """Templates may change a turn's text (escape it, for example), but not drop the turn."""
        probe = [*turns]
        probe[place] = {**turns[place], "content": QUESTION}
        if QUESTION not in self._render(probe, name, generation=True):
            raise ValueError(
                f"{name}: the chat template drops messages[{place}], role {turns[place]['role']!r}: "
                "move its text to a turn that the template renders"
            )

    def _check_roles(self, turns: Turns, name: str) -> None:
        """A turn of a role unknown to the template may be dropped and stay unnoticed if another turn has its text."""
        roles = tuple(turn["role"] for turn in turns)
        if roles in self._shown:
            return
        probes = [{"role": role, "content": f"{QUESTION} {place}."} for place, role in enumerate(roles)]
        try:
            text = self._render(probes, name, generation=True)
        except ValueError:
            text = ""  # a template that inspects its turns
        if f"{QUESTION} " in text:
            for place, probe in enumerate(probes):
                if probe["content"] not in text:
                    self._check_shown(turns, place, name)
        self._shown.add(roles)

    def _render(self, turns: Turns, name: str, *, generation: bool) -> str:
        template: Any = self.tokenizer.apply_chat_template
        try:
            return str(template([dict(turn) for turn in turns], tokenize=False, add_generation_prompt=generation))
        except Exception as error:  # templates raise errors of many classes from Jinja
            raise ValueError(f"{name}: the chat template rejects these messages: {error}") from error


_ASKED: list[dict[str, str]] = [{"role": "user", "content": QUESTION}]


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _fits(rest: str, frame: tuple[str, str]) -> bool:
    before, after = frame
    return rest.startswith(before) and rest.endswith(after) and len(rest) >= len(before) + len(after)


def _split(prompt: str, whole: str, name: str) -> str:
    """`whole` without its leading `prompt`."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    at = len(_common(prompt, whole))
    raise ValueError(
        f"{name + ': ' if name else ''}the chat template cannot be split where the answer begins: the prompt ends with "
        f"{prompt[at:][-60:]!r}, but the conversation with an answer has {whole[at:][:60]!r} there; use a consistent "
        "chat template, or template = 'none' with data to which a template is already applied"
    )


def _common(one: str, other: str) -> str:
    """The common prefix of two texts."""
    count = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:count]


def _squeezed(text: str) -> str:
    """`text` without white space, which templates strip at the edges of a turn."""
    return "".join(text.split())
