"""What a model thinks before it answers, told apart from the answer."""

from __future__ import annotations

import re

__all__ = ["CLOSING", "split_reasoning"]

CLOSING = (b"</think>", b"[/THINK]")
_OWN = re.compile(r"<(/?)think>|\[(/?)THINK\]")  # what models are trained to write; others may be asked for in a prompt
_ANY = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>|\[(/?)THINK\]", re.IGNORECASE | re.ASCII)


def split_reasoning(text: str, *, anywhere: bool = False) -> tuple[str, str]:
    """The reasoning and the answer of a text, in time that grows with its length.

    Reasoning is what stands in ``<think>`` tags at the beginning (also unclosed: then there is no answer), or before a
    closing tag whose opening one was part of the prompt.

    Args:
        text: as the model wrote it.
        anywhere: also tags further on and of other names, and the last closing one counts: for answers that are read,
            not kept.

    Examples:
        >>> [split_reasoning(text) for text in ("<think>hm</think>\\nApple", "hm</think>Apple", "<think>hm")]
        [('hm', 'Apple'), ('hm', 'Apple'), ('hm', '')]
        >>> split_reasoning("Use the <think> tag.")
        ('', 'Use the <think> tag.')
    """
    reasoning: list[str] = []
    answer: list[str] = []
    depth, at, begun = 0, 0, False
    for tag in (_ANY if anywhere else _OWN).finditer(text):
        opens = not (tag[1] or tag[2])
        before = text[at : tag.start()]
        if not anywhere and not depth and (begun or (opens and before.strip())):
            break  # the answer has begun: what follows is its own
        if opens:
            (reasoning if depth else answer).append(before)
            depth += 1
        elif depth:
            reasoning.append(before)
            depth = 0  # one closing tag ends it, however often it was opened
            begun = True
        else:  # opened in the prompt
            reasoning += [*answer, before]
            answer = []
            begun = True
        at = tag.end()
    (reasoning if depth else answer).append(text[at:])
    found = "".join(answer)
    return "\n".join(part.strip() for part in reasoning if part.strip()), found.lstrip() if reasoning or at else found
