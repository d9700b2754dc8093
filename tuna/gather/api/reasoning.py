"""Separation of a model's reasoning from its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["CLOSING", "split_reasoning"]

CLOSING = (b"</think>", b"[/THINK]", b"</seed:think>", "◁/think▷".encode(), b"<|end_of_thought|>")
# Tags that models are trained to write; prompts may request others.
_OWN = re.compile(
    r"<(?P<xml>/?)(?:seed:)?think>|\[(?P<square>/?)THINK\]|◁(?P<triangle>/?)think▷|<\|(?P<bar>begin|end)_of_thought\|>"
)
_ANY = re.compile(
    r"<\s?(?P<xml>/?)\s?(?:\w{1,20}:)?(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)"
    r"(?:\s[^<>]{0,100})?>|\[(?P<square>/?)THINK(?:ING)?\]|◁(?P<triangle>/?)think▷|<\|(?P<bar>begin|end)_of_thought\|>",
    re.IGNORECASE | re.ASCII,
)
# Harmony (gpt-oss): channels other than the answer, if its special tokens were left in the text.
_CHANNEL = re.compile(r"<\|channel\|>\s?(\w{1,20})[^<]{0,100}(?:<\|constrain\|>\w{1,20})?<\|message\|>")


def split_reasoning(text: str, *, anywhere: bool = False) -> tuple[str, str]:
    """Split a text into reasoning and answer, in linear time.

    Reasoning is text in `<think>` tags at the beginning (if unclosed, there is no answer), or before a closing tag
    whose opening tag was part of the prompt.

    Args:
        text: the model's output.
        anywhere: also accept later tags and other names, up to the last closing tag: for answers that are parsed, not
            kept.

    Examples:
        >>> [split_reasoning(text) for text in ("<think>hm</think>\\nApple", "hm</think>Apple", "<think>hm")]
        [('hm', 'Apple'), ('hm', 'Apple'), ('hm', '')]
        >>> split_reasoning("Use the <think> tag.")
        ('', 'Use the <think> tag.')
    """
    channels = list(_CHANNEL.finditer(text)) if text.lstrip().startswith(("<|channel|>", "<|start|>")) else []
    if channels:
        return _final_channel(text, channels)
    reasoning: list[str] = []
    answer: list[str] = []
    depth, at, begun = 0, 0, False
    for tag in (_ANY if anywhere else _OWN).finditer(text):
        opens = not any(tag[name] for name in ("xml", "square", "triangle")) and (tag["bar"] or "").lower() != "end"
        before = text[at : tag.start()]
        if not anywhere and not depth and (begun or (opens and before.strip())):
            break  # the answer has begun
        if opens:
            (reasoning if depth else answer).append(before)
            depth += 1
        elif depth:
            reasoning.append(before)
            depth = 0  # one closing tag ends it, even if it was opened several times
            begun = True
        else:  # opened in the prompt
            reasoning += [*answer, before]
            answer = []
            begun = True
        at = tag.end()
    (reasoning if depth else answer).append(text[at:])
    found = "".join(answer)
    return "\n".join(part.strip() for part in reasoning if part.strip()), found.lstrip() if reasoning or at else found


def _final_channel(text: str, channels: Sequence[re.Match[str]]) -> tuple[str, str]:
    """The reasoning and the last final message of a text with channels."""
    ends = [*(channel.start() for channel in channels[1:]), len(text)]
    reasoning, answer = [], ""
    for channel, end in zip(channels, ends, strict=True):
        said = re.split(r"<\|(?:end|return|call|start)\|>", text[channel.end() : end], maxsplit=1)[0]
        if channel[1] == "final":
            answer = said
        else:
            reasoning.append(said.strip())
    return "\n".join(filter(None, reasoning)), answer.lstrip()
