"""Orders of candidates written as text: `2 > 1 = 3`, `[2, [1, 3]]`, a numbered list, `1st: Candidate 2`.

Candidates are numbered from 1. An order is a list of tiers, best first; candidates in one tier are tied. What is
not plainly an order is `Unparsable`: nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

__all__ = ["EVERYONE", "Tiers", "Unparsable", "candidate_number", "order_in_text", "tiers_of"]

Tiers: TypeAlias = list[list[int]]

EVERYONE: Tiers = []  # this very list: all are tied, however many they are
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
LABEL = r"(?:candidate|response|answer|output|option|completion|assistant|model)"
NUMBER = rf"(?:\d+|{'|'.join(WORDS)})"
MARKS = "*_`\"' \t"

_CANDIDATE = re.compile(
    rf"(?:the )?(?:{LABEL}[ _-]*)?(?:number |no\. ?|#)?[\[(<#]*({NUMBER})(?:\.0)?[\])>]*\.?", re.IGNORECASE
)
# "Candidate 3 - it is complete": only a label makes it plain that the number is a candidate's.
_LABELLED = re.compile(rf"[\[(<]*{LABEL}[ _-]*#?[\[(<]*({NUMBER})\b", re.IGNORECASE)
_HEADING = re.compile(
    r"^[\s>*#_`-]*(?P<words>(?:[a-z]+[ ]+){0,5}?"
    r"(?:rank(?:ings?|ed(?: list| order)?)?|best to worst|worst to best)\b[^:=\n]*?)"
    r"[*_`]*\s*(?::|=|\bis\b)[*_`]*(?P<rest>.*)$",
    re.IGNORECASE,
)
_ITEM = re.compile(r"^\s*(?:(\d+)\s*[.):]|[-*•])\s*(.+)$")
_ORDINAL = re.compile(
    rf"^[\s*_#-]*(?:(\d+)(?:st|nd|rd|th)|({'|'.join(ORDINALS)}))(?: place| rank| best)?[*_]*\s*[:=-]+\s*(.+)$",
    re.IGNORECASE,
)
_ALL_TIED = re.compile(r"^(?:all|none)\b.*\b(?:tied?|equal(?:ly)?|the same)\b", re.IGNORECASE)


class Unparsable(ValueError):
    """An answer of a judge that does not say plainly how the candidates are ordered, and why."""


def candidate_number(value: Any) -> int:
    """The number of a candidate: 2, 2.0, "2", "Candidate 2", "[2]", "#2", "two".

    Raises:
        Unparsable: anything else (also true, 2.5, "B").
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    found = _CANDIDATE.fullmatch(value.strip(MARKS)) if isinstance(value, str) else None
    if found is None:
        raise Unparsable(f"{_short(value)} is no candidate's number")
    word = found[1].lower()
    return WORDS.index(word) + 1 if word in WORDS else int(word)


def tiers_of(value: Any) -> Tiers:
    """An order given as a JSON value.

    A list holds, from best to worst, candidates, lists of tied ones, or objects ``{candidate, rank}`` (sorted by
    rank where all have one). A text is an order as above. An object maps labelled candidates to ranks
    (``{"Candidate 2": 1}``); one whose keys are bare numbers could mean either way and is refused.

    Raises:
        Unparsable: no order.
    """
    if isinstance(value, str):
        return _tiers_of_text(value)
    if isinstance(value, Mapping):
        return _by_rank([(_labelled(key), rank) for key, rank in value.items()])
    if not isinstance(value, list):
        raise Unparsable(f"the ranking is {_short(value)}, not a list")
    if value and all(isinstance(item, Mapping) for item in value):
        numbers = [_number_of_object(item) for item in value]
        if all("rank" in item for item in value):
            return _by_rank([(number, item["rank"]) for number, item in zip(numbers, value, strict=True)])
        return [[number] for number in numbers]
    if len(value) == 1 and isinstance(value[0], str) and ">" in value[0]:
        return _tiers_of_text(value[0])
    return [_tier(item) for item in value]


def order_in_text(text: str) -> Tiers:
    """The order that a text states after a heading ("Ranking: …"), or in lines that begin with ordinals.

    Of several, those called final count; if these disagree, none does.

    Raises:
        Unparsable: there is none, or several that disagree.
    """
    lines = text.splitlines()
    found: list[tuple[bool, Tiers]] = []
    problem: Unparsable | None = None
    for number, line in enumerate(lines):
        heading = _HEADING.match(line)
        if heading is None:
            continue
        words = heading["words"].lower()
        rest = heading["rest"].strip(MARKS)
        try:
            tiers = _tiers_of_text(rest) if rest else _list_below(lines[number + 1 :])
        except Unparsable as error:
            problem = error
            continue
        if re.search(r"worst to best|worst first|from worst|from the worst", words):
            tiers = tiers[::-1]
        found.append(("final" in words, tiers))
    if not found:
        ordinals = _ordinal_lines(lines)
        if ordinals:
            return ordinals
        raise problem or Unparsable("no ranking is in the answer")
    finals = [tiers for final, tiers in found if final] or [tiers for _, tiers in found]
    if any(_canonical(tiers) != _canonical(finals[0]) for tiers in finals):
        raise Unparsable("the answer holds several rankings that disagree")
    return finals[0]


def _tier(item: Any) -> list[int]:
    if isinstance(item, list):
        if not item:
            raise Unparsable("the ranking holds an empty tie")
        return [candidate_number(member) for member in item]
    if isinstance(item, str) and "=" in item:
        return [candidate_number(part) for part in item.split("=")]
    return [candidate_number(item)]


def _tiers_of_text(text: str) -> Tiers:
    text = text.strip(MARKS).rstrip(".;")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list):
        return tiers_of(value)
    if _ALL_TIED.match(text):
        return EVERYONE
    plain = re.sub(r"\s*(?:->|→|≻|»)\s*", " > ", text)
    plain = re.sub(r",?\s+(?:and )?then\s+", " > ", plain, flags=re.IGNORECASE)
    if "<" in plain and ">" in plain:
        raise Unparsable(f"{_short(text)} points both ways")
    if "<" in plain:
        return [_tied(part) for part in plain.split("<")][::-1]
    if ">" in plain:
        return [_tied(part) for part in plain.split(">")]
    return [_tied(part) for part in re.split(r"[,;]", plain.strip("[]() "))]


def _tied(text: str) -> list[int]:
    """One tier: `1 = 3`, `1 ~ 3`, `(1, 3)`, `1 and 3 (tie)`."""
    text = re.sub(r"\(?\b(?:tied?|equal)\b\)?", "", text, flags=re.IGNORECASE).strip()
    return [candidate_number(part.strip("[](){} ")) for part in re.split(r"=|~|≈|,|&|\band\b", text)]


def _list_below(lines: list[str]) -> Tiers:
    """The list that follows a heading: numbered or dotted lines, blank ones between allowed before the first."""
    tiers: Tiers = []
    for line in lines:
        if not line.strip() and not tiers:
            continue
        item = _ITEM.match(line)
        if item is None:
            if not tiers and line.strip():
                return _ordinal_lines(lines) or _tiers_of_text(line)
            break
        if item[1] is not None and int(item[1]) != len(tiers) + 1:
            raise Unparsable(f"item {item[1]} of the list stands in place {len(tiers) + 1}")
        tiers.append(_item(item[2]))
    if not tiers:
        raise Unparsable("the ranking is empty")
    return tiers


def _item(text: str) -> list[int]:
    try:
        return _tied(text.strip(MARKS))
    except Unparsable:
        found = _LABELLED.match(text.strip(MARKS))
        if found is None:
            raise
        return [candidate_number(found[1])]


def _ordinal_lines(lines: list[str]) -> Tiers:
    """Lines such as `1st: Candidate 2`; equal ordinals tie. Empty where there are none."""
    found = [match for match in map(_ORDINAL.match, lines) if match]
    places = [int(m[1]) if m[1] else ORDINALS.index(m[2].lower()) + 1 for m in found]
    return _by_rank([(n, place) for m, place in zip(found, places, strict=True) for n in _item(m[3])])


def _number_of_object(item: Mapping[str, Any]) -> int:
    for name in ("candidate", "response", "answer", "number", "id", "index"):
        if name in item:
            return candidate_number(item[name])
    raise Unparsable(f"{_short(item)} names no candidate")


def _labelled(key: Any) -> int:
    found = _LABELLED.fullmatch(str(key).strip(MARKS))
    if found is None:
        raise Unparsable(f"the ranking is an object whose key {_short(key)} may be a candidate or a rank")
    return candidate_number(found[1])


def _by_rank(pairs: list[tuple[int, Any]]) -> Tiers:
    """Candidates sorted by rank, 1 the best, equal ranks tied."""
    for number, rank in pairs:
        if isinstance(rank, bool) or not isinstance(rank, int | float):
            raise Unparsable(f"the rank of candidate {number} is {_short(rank)}")
    return [[number for number, rank in pairs if rank == level] for level in sorted({rank for _, rank in pairs})]


def _canonical(tiers: Tiers) -> list[list[int]]:
    return [sorted(tier) for tier in tiers]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
