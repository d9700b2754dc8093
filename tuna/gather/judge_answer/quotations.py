"""Separation of a judge's quotations of the candidates from its own words: a quoted order is not a verdict.

A quotation is text between the tags of a candidate, a line that begins with `>`, text introduced by a line such as
"Candidate 2 says:" (the block below it or the rest of its paragraph), or an object inside a sentence that attributes it
to a candidate. Code fences contain a judge's own words as often as quotations; they count only if nothing outside of
them does.
"""

from __future__ import annotations

import re

__all__ = ["is_quoted", "own_lines", "without_tagged"]

_WHO = r"(?:candidate|response|answer|output|option|completion|assistant|model|text|it|one)s?\b"
_STRONG = (
    r"(?:says?|said|saying|claim(?:s|ed|ing)?|writes?|wrote|written|contain(?:s|ed|ing)?|quot(?:e|es|ed|ing)|"
    r"stat(?:es|ed|ing)|reads|ignor(?:e|es|ed|ing)|inject(?:s|ed|ion|ing)?|pretend(?:s|ed|ing)?|insert(?:s|ed)?|"
    r"demand(?:s|ed)?|instruct(?:s|ed|ing)|assert(?:s|ed)?|declar(?:es|ed))"
)
_WEAK = (
    r"(?:has|had|have|having|gives?|gave|includes?|included|ends?(?: with)?|begins?(?: with)?|tells?|asks?|tries|"
    r"holds?|shows?)"
)
# Words after the verb at the end of an introduction: "contains the line", "has its own final ranking".
_OBJECT = re.compile(
    r"(?: [a-z]+){0,4} "
    r"(?:lines?|texts?|words?|verdict|rankings?|order|sentence|heading|passage|block|json|object|following)",
    re.IGNORECASE | re.ASCII,
)
_SAYER = re.compile(rf"\b{_WHO}", re.IGNORECASE | re.ASCII)
_VERB = re.compile(rf"\b(?:{_STRONG}|{_WEAK})\b", re.IGNORECASE | re.ASCII)
_CLAIM = re.compile(rf"\b{_STRONG}\b|\b{_WHO}[^.!?]{{0,120}}\b{_WEAK}\b", re.IGNORECASE | re.ASCII)
_FENCE = re.compile(r"\s{0,9}(?:```|~~~|\"\"\"|''')")
# "The text of candidate 2 is:"
_OF = re.compile(
    r"\b(?:texts?|contents?|words?|lines?|verdict|claim|message) (?:of|in|from|by) (?:the )?"
    rf"{_WHO}[^.!?:]{{0,40}}(?:$|:)",
    re.IGNORECASE | re.ASCII,
)
_TAG = re.compile(
    r"<(/?)(?:candidate|instruction|turn)(?:-[0-9a-f]{1,64})?(?:\s[^<>]{0,200})?>|<(/?)quot(?:e|ed|ation)>",
    re.IGNORECASE | re.ASCII,
)
CONTEXT = 300  # characters of a sentence, before and after


def without_tagged(text: str) -> str:
    """A text without the content of the prompt's tags and of quotes, also unclosed ones."""
    kept, depth, at = [], 0, 0
    for tag in _TAG.finditer(text):
        if not depth:
            kept.append(text[at : tag.start()])
        depth = max(0, depth - 1) if tag[1] or tag[2] else depth + 1
        at = tag.end()
    return "".join([*kept, "" if depth else text[at:]])


def own_lines(text: str) -> tuple[list[str], list[str]]:
    """The unquoted lines of a text outside of code fences, and those inside; other lines are "" in each list."""
    lines = text.splitlines()
    plain, fenced = [""] * len(lines), [""] * len(lines)
    inside = quoted_fence = quoting = introduced = False
    for number, line in enumerate(lines):
        if _FENCE.match(line):
            inside = not inside
            quoted_fence = inside and introduced
            introduced = quoting = False
        elif inside:
            fenced[number] = "" if quoted_fence else line
        elif not line.strip():
            quoting = False  # the paragraph ends; an introduced block may follow
        elif line.lstrip().startswith(">"):
            introduced = quoting = False
        elif quoting or introduced:
            quoting, introduced = True, False
        else:
            introduced = _introduces(line)
            plain[number] = line
    return plain, fenced


def is_quoted(text: str, start: int, end: int) -> bool:
    """Whether the object at text[start:end] is part of a quotation or of a sentence about one."""
    line_start = max(text.rfind("\n", 0, start) + 1, start - CONTEXT)
    before = text[line_start:start]
    line_end = text.find("\n", end, end + CONTEXT)
    after = text[end : line_end if line_end >= 0 else end + CONTEXT]
    if before.lstrip().startswith(">"):
        return True
    sentence = re.split(r"[.!?]\s", before)[-1]
    if _CLAIM.search(sentence) or _OF.search(sentence.rstrip()):
        return True
    if re.match(r"[\s`\"')]*[,;a-z-]", after) and _CLAIM.search(re.split(r"[.!?](?:\s|$)", after)[0]):
        return True
    # An object at the beginning of a line may be introduced by the line above it, or above a fence.
    if before.strip(" \t`*_"):
        return False
    above = [line for line in text[max(0, line_start - 2 * CONTEXT) : line_start].splitlines() if line.strip()]
    while above and _FENCE.match(above[-1]):
        above.pop()
    return bool(above) and _introduces(above[-1])


def _introduces(line: str) -> bool:
    """Whether a line ends like "Candidate 2 says:", "Candidate 1's answer has" or "The second contains the line"."""
    sentence = re.split(r"[.!?] ", " ".join(line[-CONTEXT:].split()))[-1].rstrip("*_` ")
    sayer, verbs = _SAYER.search(sentence), list(_VERB.finditer(sentence))
    if sayer is None or not verbs or verbs[-1].start() < sayer.end():
        return False
    rest = sentence[verbs[-1].end() :]
    return rest in ("", ":") or rest.endswith(":") or _OBJECT.fullmatch(rest) is not None
