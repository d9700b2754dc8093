"""A tokenizer's chat template: the text before an answer, around it, and the token that ends it.

What is trained is what the template renders. The prompt is the conversation up to the generation prompt; a response is
everything that the template writes from there to the end of the turn: a blank or an empty think block before the
answer, the answer (stripped, where the template strips it), what stands between it and the end token, and the end
token. A template whose generation prompt is not how it begins the assistant's turn cannot be split there and is
refused, and so is one that leaves out a turn or a part of an answer.
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

ANSWER = "tuna probes an answer"  # neither blanks at its edges nor anything a template could take for markup
QUESTION = "tuna probes a question"
Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Answer:
    """A response as it follows the prompt: what the template writes before its text, the text, and what comes after.

    `ended` says that `after` closes with the end token, printed by the template; else the end of sequence follows.
    """

    before: str
    text: str
    after: str
    ended: bool

    @property
    def whole(self) -> str:
        """All of it in one piece."""
        return self.before + self.text + self.after


def special_text(tokenizer: PreTrainedTokenizerBase, *, added: bool = False) -> re.Pattern[str]:
    """Matches text that spells a special token; with `added` any token that was added to the vocabulary."""
    found = set(tokenizer.all_special_tokens)
    found |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special or added}
    longest_first = sorted(filter(None, found), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class ChatTemplate:
    """The chat template of a tokenizer, which must have one.

    Raises:
        ValueError: from `prompt` and `answers`: the template refuses the turns, leaves some out, or cannot be split.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._shown: set[tuple[str, ...]] = set()  # orders of roles that are rendered whole

    def prompt(self, turns: Turns, name: str) -> str:
        """The conversation up to where the assistant's turn begins; `name` is that of the record, for errors."""
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
                raise ValueError(f"{name}: the chat template leaves out a part of responses[{number}]")
            if frame is None or not _fits(rest, frame):
                frame = self._frame(self._after(turns, prompt, ANSWER, name))
            if frame is None:
                raise ValueError(f"{name}: the chat template changes answers: it cannot be told where they stand")
            found.append(self._answer(rest, frame))
        return found

    @cached_property
    def end(self) -> str | None:
        """The text of the token that ends the assistant's turn: the first special token behind an answer.

        One that closes the user's turn as well goes before others. Where there is no special token, the first one that
        was added to the vocabulary; None where plain text closes a turn, or nothing does. What stands behind the last
        turn of a conversation only (`</s>` after `<|im_end|>`) is looked at last.
        """
        try:
            last = self._render([*_ASKED, _said(ANSWER)], "", generation=False)
        except ValueError:  # prompts have their own error
            return None
        head, found, last = last.rpartition(ANSWER)
        if not found:
            return None
        asked = head.rpartition(QUESTION)[2]
        places = [last]
        try:
            more = self._render([*_ASKED, _said(ANSWER), {"role": "user", "content": "more"}], "", generation=False)
            places.insert(0, _common(last, more.rpartition(ANSWER)[2]))
        except ValueError:  # one that takes a single question
            pass
        for place in places:
            for added in (False, True):
                tokens = special_text(self.tokenizer, added=added).findall(place)
                if tokens:  # what closes the user's turn too closes a turn, and not a part of one
                    return next((token for token in tokens if token in asked), str(tokens[0]))
        return None

    def answer_in(self, text: str) -> str:
        """The answer in a text that a model wrote after the prompt: without what the template writes around it."""
        if self._usual is None:
            return text
        before, after = (self._visible(part) for part in self._usual)
        if before and text.startswith(before):
            text = text[len(before) :]
        return text[: -len(after)] if after and text.endswith(after) else text

    def check(self) -> None:
        """Refuse a template that could not be split for any record; one that refuses the probe is left to its records.

        Raises:
            ValueError: the generation prompt is not how the assistant's turn begins.
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
        """What stands before and after an answer to one question, None where it cannot be told."""
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
            before = ""  # what the template writes there depends on the answer (a think block that it holds already)
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
        """As a decoded answer shows it: without special tokens and the end."""
        text = text.partition(self.end)[0] if self.end else text
        return special_text(self.tokenizer).sub("", text)

    def _check_shown(self, turns: Turns, place: int, name: str) -> None:
        """Templates may change a turn's text (escape it, say), but not leave the turn out."""
        probe = [*turns]
        probe[place] = {**turns[place], "content": QUESTION}
        if QUESTION not in self._render(probe, name, generation=True):
            raise ValueError(
                f"{name}: the chat template leaves out messages[{place}], the turn of {turns[place]['role']!r}: "
                "put its text into a turn that the template shows"
            )

    def _check_roles(self, turns: Turns, name: str) -> None:
        """A turn of a role that the template knows nothing of may vanish, though its text stands elsewhere too."""
        roles = tuple(turn["role"] for turn in turns)
        if roles in self._shown:
            return
        probes = [{"role": role, "content": f"{QUESTION} {place}."} for place, role in enumerate(roles)]
        try:
            text = self._render(probes, name, generation=True)
        except ValueError:
            text = ""  # one that looks into its turns
        if f"{QUESTION} " in text:
            for place, probe in enumerate(probes):
                if probe["content"] not in text:
                    self._check_shown(turns, place, name)
        self._shown.add(roles)

    def _render(self, turns: Turns, name: str, *, generation: bool) -> str:
        template: Any = self.tokenizer.apply_chat_template
        try:
            return str(template([dict(turn) for turn in turns], tokenize=False, add_generation_prompt=generation))
        except Exception as error:  # templates refuse by raising from Jinja, each with a class of its own
            raise ValueError(f"{name}: the chat template refuses these messages: {error}") from error


_ASKED: list[dict[str, str]] = [{"role": "user", "content": QUESTION}]


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _fits(rest: str, frame: tuple[str, str]) -> bool:
    before, after = frame
    return rest.startswith(before) and rest.endswith(after) and len(rest) >= len(before) + len(after)


def _split(prompt: str, whole: str, name: str) -> str:
    """`whole` without the prompt it begins with."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    at = len(_common(prompt, whole))
    raise ValueError(
        f"{name + ': ' if name else ''}the chat template cannot be split where the answer begins: its prompt ends with "
        f"{prompt[at:][-60:]!r}, where the conversation with an answer goes on with {whole[at:][:60]!r}; use a chat "
        "template that agrees with itself, or template = 'none' with data that is templated already"
    )


def _common(one: str, other: str) -> str:
    """What both texts begin with."""
    count = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:count]


def _squeezed(text: str) -> str:
    """Without white space, which templates strip at the edges of a turn."""
    return "".join(text.split())
