"""Orders of candidates written as text: `2 > 1 = 3`, `[2, [1, 3]]`, a numbered list, `1st: Candidate 2`.

Candidates are numbered from 1. An order is a list of tiers, best first; candidates in one tier are tied. Anything that
is not clearly an order is `Unparsable`: nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeAlias

from tuna.gather.api.bodies import parse_json, short
from tuna.gather.judge_answer.quotations import own_lines

__all__ = ["EVERYONE", "REVERSED", "Tiers", "Unparsable", "candidate_number", "order_in_text", "tiers_of"]

Tiers: TypeAlias = list[list[int]]

EVERYONE: Tiers = []  # compared by identity: all candidates are tied, whatever their number
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
LABEL = r"(?:candidate|response|answer|output|option|completion|assistant|model)"
NUMBER = rf"(?:[0-9]{{1,4}}|{'|'.join(WORDS)})"
RANKS = ("rank", "ranking", "position", "place", "placement", "tier", "level", "standing")
SCORES = ("score", "total", "points", "rating", "sum", "grade", "quality", "average", "mean", "mark")
NAMES = (
    "candidate", "candidates", "members", "responses", "answers", "response", "answer", "number", "id", "index", "no"
)  # fmt: skip
"""Last words of fields that name the candidate of an object, or number the objects."""
MARKS = "*_`\"' \t"

FLAGS = re.IGNORECASE | re.ASCII  # with Unicode, U+017F would match s, and other scripts' digits would be digits
MOST_LINE = 2000  # characters of an order in text
MOST_HEADINGS = 16

_CANDIDATE = re.compile(
    rf"(?:the )?(?:{LABEL}[ _-]*)?(?:number |no\. ?|#)?[\[(<#]{{0,3}}({NUMBER})(?:\.0)?[\])>]{{0,3}}\.?", FLAGS
)
# "Candidate 3 - it is complete": only a label makes it clear that the number is a candidate's.
_LABELLED = re.compile(rf"[\[(<]{{0,3}}{LABEL}[ _-]*#?[\[(<]{{0,3}}({NUMBER})\b", FLAGS)
# A heading of a ranking begins like this and continues with ":", "=" or "is".
_HEADING = re.compile(
    r"(?:[a-z]+ ){0,5}?(?:rank(?:ings?|ed(?: list| order)?)?|(?:best|worst) (?:to|first|last)\b|from (?:best|worst))\b",
    FLAGS,
)
_SEPARATOR = re.compile(r":|=|\bis\b", FLAGS)
_WORST, _BEST = "(?:worst|weakest|poorest|lowest|least)", "(?:best|strongest|highest|most)"
_WORSE = "(?:worst|weakest|poorest|lowest|least|worse|weaker|poorer|lower|low|bad|poor|bottom|last)"
_BETTER = "(?:best|strongest|highest|most|better|stronger|higher|high|good|great|excellent|top|first)"
_WAY = r"(?: \w+)?[ _-]{0,3}(?:to|->|=>|→|-)[ _-]{0,3}(?:the )?"
REVERSED = re.compile(
    rf"\b{_WORSE}{_WAY}{_BETTER}\b|\b{_WORST}(?: \w+)?(?: comes)? first\b|\b{_BEST}(?: \w+)?(?: comes)? last\b", FLAGS
)
_FORWARD = re.compile(
    rf"\b{_BETTER}{_WAY}{_WORSE}\b|\b{_BEST}(?: \w+)?(?: comes)? first\b|\bfrom (?:the )?{_BEST}\b", FLAGS
)
_FROM_WORST = re.compile(rf"\bfrom (?:the )?{_WORST}\b", FLAGS)
_UNCLEAR = re.compile(r"\b(?:ascending|increasing|descending|decreasing|reversed?|inverted)\b", FLAGS)
# "1. Candidate 1: rank 2" is not an item of a list in order.
_PLACE = re.compile(r"\b(?:rank(?:ed|s)?|place[ds]?|position)\W{0,3}(?:number |no\. |#)?([0-9]{1,4})\b", FLAGS)
_LAST = re.compile(r"\b(?:worst|last place|ranked last|weakest|poorest)\b", FLAGS)
_ITEM = re.compile(r"\s*(?:([0-9]{1,4})\s?[.):]|[-*•])\s*(\S.*)", re.ASCII)
_ORDINAL = re.compile(
    rf"[ *_#-]{{0,9}}(?:([0-9]{{1,4}})(?:st|nd|rd|th)|({'|'.join(ORDINALS)}))(?: place| rank| best)?[*_]{{0,3}} ?"
    r"[:=-]{1,3}[*_]{0,3} ?(\S.*)",
    FLAGS,
)
_MARK = re.compile(r"\s{0,9}(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(?:/|%|out of|points?|$)", FLAGS)
_ALL_TIED = re.compile(r"^(?:all|none)\b.*\b(?:tied?|equal(?:ly)?|the same)\b", FLAGS)


class Unparsable(ValueError):
    """A judge's answer does not give a clear order; the message says why."""


def candidate_number(value: Any) -> int:
    """The number of a candidate: 2, 2.0, "2", "Candidate 2", "[2]", "#2", "two".

    Raises:
        Unparsable: anything else (also true, 2.5, "B").
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 9999 and value == int(value):
        return int(value)
    found = _CANDIDATE.fullmatch(value.strip(MARKS)) if isinstance(value, str) and len(value) <= MOST_LINE else None
    if found is None:
        raise Unparsable(f"{_short(value)} is not a candidate's number")
    word = found[1].lower()
    return WORDS.index(word) + 1 if word in WORDS else int(word)


def tiers_of(value: Any) -> Tiers:
    """Read an order given as a JSON value.

    A list has, from best to worst, candidates, lists of tied ones, or objects `{candidate, rank}` (sorted by
    rank if all have one). A string is an order as above. An object maps labelled candidates to ranks
    (`{"Candidate 2": 1}`); one whose keys are bare numbers is ambiguous and rejected.

    Raises:
        Unparsable: not an order.
    """
    if isinstance(value, str):
        return _tiers_of_text(value)
    if isinstance(value, Mapping):
        return _by_rank([(_labelled(key), rank) for key, rank in value.items()])
    if not isinstance(value, list):
        raise Unparsable(f"the ranking is {_short(value)}, not a list")
    if value and all(isinstance(item, Mapping) for item in value):
        return _tiers_of_objects(value)
    if len(value) == 1 and isinstance(value[0], str) and ">" in value[0]:
        return _tiers_of_text(value[0])
    return [_tier(item) for item in value]


def order_in_text(text: str) -> Tiers:
    """The order in a text after a heading ("Ranking: …"), or in lines that begin with ordinals.

    Quotations are ignored, and code fences too unless there is nothing outside of them. Of several orders, those called
    final count, unless another one follows; if they disagree, none counts.

    Raises:
        Unparsable: there is none, or several that disagree, or the direction of one is unclear.
    """
    plain, fenced = own_lines(text)
    try:
        return _order_in_lines(plain)
    except NoOrder as error:
        if not any(fenced):
            raise
        try:
            return _order_in_lines(fenced)
        except NoOrder:
            raise error from None


class NoOrder(Unparsable):
    """No ranking at all."""


def _order_in_lines(lines: list[str]) -> Tiers:
    found: list[tuple[bool, Tiers]] = []
    problem: Unparsable | None = None
    headings = [(number, heading) for number, line in enumerate(lines) if (heading := _heading(line)) is not None]
    if len(headings) > MOST_HEADINGS:
        raise Unparsable(f"the answer has {len(headings)} rankings")
    elsewhere = set(range(len(lines))) - {number for number, _ in headings}
    turned = any(REVERSED.search(lines[number][:MOST_LINE]) for number in elsewhere if lines[number])
    for number, (words, rest) in headings:
        below = lines[number + 1 : number + 100]
        try:
            tiers = _tiers_of_text(rest) if rest else _list_below(below)
        except Unparsable as error:
            problem = error
            continue
        backward = _turned_round(words, rest or next(filter(str.strip, below), ""), turned)
        found.append(("final" in words, tiers[::-1] if backward else tiers))
    if not found:
        ordinals = [] if turned else _ordinal_lines(lines)
        if ordinals:
            return ordinals
        raise problem or NoOrder("no ranking in the answer")
    finals = [tiers for final, tiers in found if final]
    # A ranking called final counts as final only if no other one follows it.
    counted = [*finals, found[-1][1]] if finals else [tiers for _, tiers in found]
    if any(_canonical(tiers) != _canonical(counted[0]) for tiers in counted):
        raise Unparsable("the answer has several rankings that disagree")
    return counted[0]


def _heading(line: str) -> tuple[str, str] | None:
    """The words of a heading and the rest of its line; None if the line is not a heading."""
    line = " ".join(line[: MOST_LINE + 1].split()).lstrip("*#_`- ")
    begun = _HEADING.match(line[:200])
    ended = _SEPARATOR.search(line, begun.end(), begun.end() + 80) if begun is not None else None
    if ended is None:
        return None
    if len(line) > MOST_LINE:
        return line[: ended.start()].lower(), "(a line too long to be an order)"
    return line[: ended.start()].lower(), line[ended.end() :].strip(MARKS)


def _turned_round(words: str, order: str, turned: bool) -> bool:
    """Whether an order must be reversed, by the words of its heading.

    Args:
        words: of the heading.
        order: the line with the order. In `1 < 2` the sign already says which is better.
        turned: whether the surrounding text says that the worst comes first.
    """
    bare = re.sub(r"[-=]+>|<[-=]+", "", order)
    sign = "<" if "<" in bare else ">" if ">" in bare else ""
    backward = (REVERSED.search(words) or _FROM_WORST.search(words)) is not None
    forward = _FORWARD.search(words) is not None
    if (backward and forward) or _UNCLEAR.search(words) or (turned and not backward and not forward):
        raise Unparsable("it is not clear whether the best or the worst comes first")
    if (sign == ">" and backward) or (sign == "<" and forward):
        raise Unparsable(f"the heading and {_short(order)} have opposite directions")
    return backward and not sign


def _tier(item: Any) -> list[int]:
    if isinstance(item, list):
        if not item:
            raise Unparsable("the ranking has an empty tie")
        return [candidate_number(member) for member in item]
    if isinstance(item, str) and "=" in item:
        return [candidate_number(part) for part in item.split("=")]
    return [candidate_number(item)]


def _tiers_of_text(text: str) -> Tiers:
    if len(text) > MOST_LINE:
        raise Unparsable(f"an order of {len(text):,} characters")
    text = " ".join(text.split()).strip(MARKS).rstrip(".;")
    try:
        value = parse_json(text.encode())
    except ValueError:
        value = None
    if isinstance(value, list):
        return tiers_of(value)
    if _ALL_TIED.match(text):
        return EVERYONE
    plain = re.sub(r"\s*(?:->|→|≻|»)\s*", " > ", text)
    plain = re.sub(r",?\s+(?:and )?then\s+", " > ", plain, flags=FLAGS)
    if "<" in plain and ">" in plain:
        raise Unparsable(f"{_short(text)} has signs of both directions")
    if "<" in plain:
        return [_tied(part) for part in plain.split("<")][::-1]
    if ">" in plain:
        return [_tied(part) for part in plain.split(">")]
    return [_tied(part) for part in re.split(r"[,;]", plain.strip("[]() "))]


def _tied(text: str) -> list[int]:
    """One tier: `1 = 3`, `1 ~ 3`, `(1, 3)`, `1 and 3 (tie)`."""
    text = re.sub(r"\(?\b(?:tied?|equal)\b\)?", "", text, flags=FLAGS).strip()
    return [candidate_number(part.strip("[](){} ")) for part in re.split(r"=|~|≈|,|&|\band\b", text)]


def _list_below(lines: list[str]) -> Tiers:
    """The list after a heading: numbered or bulleted lines; blank lines are allowed before the first."""
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
            raise Unparsable(f"item {item[1]} of the list is in position {len(tiers) + 1}")
        tiers.append(_item(item[2], len(tiers) + 1))
    if not tiers:
        raise Unparsable("the ranking is empty")
    return tiers


def _item(text: str, place: int) -> list[int]:
    """The candidates of a list item at position `place`."""
    text = text[:MOST_LINE].strip(MARKS)
    try:
        return _tied(text)
    except Unparsable:
        found = _LABELLED.match(text)
        if found is None:
            raise
    rest = text[found.end() :]
    if any(int(told) != place for told in _PLACE.findall(rest)) or (place == 1 and _LAST.search(rest)):
        raise Unparsable(f"item {place} of the list, {_short(text)}, names another position")
    return [candidate_number(found[1])]


def _ordinal_lines(lines: list[str]) -> Tiers:
    """The order in lines such as `1st: Candidate 2`; equal ordinals tie. Empty if there are none."""
    found = [match for match in (_ORDINAL.match(line[:MOST_LINE].strip()) for line in lines if line) if match]
    places = [int(m[1]) if m[1] else ORDINALS.index(m[2].lower()) + 1 for m in found]
    return _by_rank([(n, place) for m, place in zip(found, places, strict=True) for n in _item(m[3], place)])


def _tiers_of_objects(items: list[Mapping[str, Any]]) -> Tiers:
    """The order of objects: by their ranks if they have any, else as listed if no score contradicts it."""
    members = [_members(item) for item in items]
    ranks = [next((value for name, value in item.items() if _last_word(name) in RANKS), None) for item in items]
    if any(rank is not None for rank in ranks):
        return _by_rank([(n, rank) for numbers, rank in zip(members, ranks, strict=True) for n in numbers])
    names = {name: _last_word(name) for item in items for name in item}
    falls = rises = ""
    for name, word in names.items():
        if word in NAMES:
            continue
        numbers = [number for item in items if (number := _number_of(item.get(name))) is not None]
        going_up = any(a < b for a, b in pairwise(numbers))
        if word in SCORES and numbers and (len(numbers) < len(items) or going_up):
            raise Unparsable(f"the ranking's objects are not in the order of their {name}")
        rises = rises or (name if going_up else "")
        falls = falls or (name if any(a > b for a, b in pairwise(numbers)) else "")
    if rises and not falls:  # scores of any name that all contradict the order
        raise Unparsable(f"the ranking's objects are in the opposite order of their {rises}")
    return members


def _last_word(name: Any) -> str:
    """The last word of a name: `rank` for "overall_rank" and "Overall Rank"."""
    return re.split(r"[^a-z]+", str(name)[:80].lower().strip("_- "))[-1]


def _number_of(value: Any) -> float | None:
    """A number, also as the text "7" or "7/10"; None if it is neither."""
    if isinstance(value, str):
        found = _MARK.match(value)
        return None if found is None else float(found[1])
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _members(item: Mapping[str, Any]) -> list[int]:
    for name in ("candidates", "members", "responses", "answers"):
        if isinstance(item.get(name), list) and item[name]:
            return [candidate_number(member) for member in item[name]]
    for name in ("candidate", "candidate_number", "candidate_id", "response", "answer", "number", "id", "index"):
        if name in item:
            return [candidate_number(item[name])]
    raise Unparsable(f"{_short(dict(item))} names no candidate")


def _labelled(key: Any) -> int:
    found = _LABELLED.fullmatch(str(key)[:MOST_LINE].strip(MARKS))
    if found is None:
        raise Unparsable(f"the ranking is an object whose key {_short(key)} may be a candidate or a rank")
    return candidate_number(found[1])


def _by_rank(pairs: list[tuple[int, Any]]) -> Tiers:
    """Candidates sorted by rank, 1 the best, equal ranks tied.

    Raises:
        Unparsable: a rank is not a number, or they do not count from 1 (they may be scores, where more is better).
    """
    ranks = []
    for number, rank in pairs:
        given = int(rank) if isinstance(rank, str) and re.fullmatch("[0-9]{1,4}", rank.strip()) else rank
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 9999:
            raise Unparsable(f"the rank of candidate {number} is {_short(rank)}")
        ranks.append(given)
    if ranks and (min(ranks) != 1 or max(ranks) > len(ranks)):
        raise Unparsable(f"the ranks {_short(ranks)} do not count from 1")
    return [
        [number for (number, _), rank in zip(pairs, ranks, strict=True) if rank == level]
        for level in sorted(set(ranks))
    ]


def _canonical(tiers: Tiers) -> list[list[int]]:
    return [sorted(tier) for tier in tiers]


def _short(value: Any) -> str:
    return short(repr(value), 60)
