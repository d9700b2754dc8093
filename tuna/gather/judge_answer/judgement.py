"""Parser of a judge's answer: tolerant of its form, strict about its content.

First the judge's reasoning (`api.reasoning`) and its quotations of the candidates (`quotations`) are removed. Then the
following are tried in order: a JSON object (also in a code fence, almost JSON, or cut off after its `ranking`; see
`loose_json`), an order in plain text (`orders`), and, without a ranking but with valid sub-scores of all candidates,
the order of their sums. The order must name every candidate once; a missing one must have been declared a duplicate
of one that is present. Everything else is `Unparsable`. The time is linear in the length of the answer, which is
bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tuna.gather.api.bodies import clean_text, parse_json, short
from tuna.gather.api.reasoning import split_reasoning
from tuna.gather.judge_answer.loose_json import FoundObject, find_objects
from tuna.gather.judge_answer.orders import (
    EVERYONE,
    REVERSED,
    Tiers,
    Unparsable,
    candidate_number,
    order_in_text,
    tiers_of,
)
from tuna.gather.judge_answer.quotations import is_quoted, without_tagged

__all__ = ["ASPECTS", "MOST_CHARACTERS", "Judgement", "Unparsable", "parse_judgement"]

ASPECTS = ("correctness", "helpfulness", "clarity")
MOST = 5  # of a sub-score
MOST_CHARACTERS = 100_000  # of an answer without its reasoning
MOST_RANKINGS = 16  # in an answer
RANKINGS = ("ranking", "final_ranking", "ranked_list", "rank", "order")
FIELDS = frozenset({*RANKINGS, "kind", "reference", "duplicates", "scores"})
REFUSAL = re.compile(
    r"\b(?:I.?m sorry|I (?:cannot|can.t|am unable|will not|won.t)|as an AI|unable to (?:rank|compare))",
    re.IGNORECASE,
)


@dataclass
class Judgement:
    """A parsed judgement. Candidates are numbered from 1 in the order shown.

    Attributes:
        ranking: tiers from best to worst; every candidate is in one.
        kind: "open" or "closed", None if not given.
        reference: the judge's own answer, None if not given.
        duplicates: groups declared equivalent.
        scores: the sub-scores of a candidate by aspect, 0 to 5; candidates without three valid ones are absent.
        source: where the ranking was found.
        notes: what was ignored or repaired.
    """

    ranking: Tiers
    kind: Literal["open", "closed"] | None = None
    reference: str | None = None
    duplicates: list[list[int]] = field(default_factory=list)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    source: Literal["json", "cut json", "text", "scores"] = "json"
    notes: list[str] = field(default_factory=list)


def parse_judgement(text: str, count: int) -> Judgement:
    """Parse a judge's answer about `count` candidates.

    Raises:
        Unparsable: it does not give a clear order; the message says why.

    Examples:
        >>> parse_judgement('```json\\n{"ranking": [[2], [1, 3]]}\\n```', 3).ranking
        [[2], [1, 3]]
        >>> parse_judgement("Ranking: 2 > 1", 3)
        Traceback (most recent call last):
            ...
        tuna.gather.judge_answer.orders.Unparsable: candidate 3 is neither ranked nor the duplicate of one that is
    """
    text = _answer(text)
    objects = [_unwrapped(found) for found in find_objects(text)]
    objects = [found for found in objects if FIELDS & {*found.value, found.open_field}]
    if len(objects) > MOST_RANKINGS:
        raise Unparsable(f"the answer has {len(objects)} objects of the requested form")
    objects = [found for found in objects if not is_quoted(text, found.start, found.end)]
    try:
        if any(_tells(found.value) or found.open_field in RANKINGS for found in objects):
            _refuse_reversed(text, objects)
            return _from_objects(objects, count)
        if any(not found.whole for found in objects):
            raise Unparsable("the JSON is cut off or malformed and has no ranking")
        return Judgement(_complete(order_in_text(text), count, []), source="text")
    except Unparsable as error:
        if not objects and REFUSAL.search(text[:400]):
            raise Unparsable(f"the judge refuses: {' '.join(text[:400].split())[:120]}") from error
        raise


def _answer(text: str) -> str:
    """The answer without the reasoning before it."""
    text = clean_text(text).replace("\xa0", " ").strip()
    try:
        value = parse_json(text.encode()) if text[:1] in ('{"', "{", '"') else None
    except ValueError:
        value = None
    if isinstance(value, str):
        text = clean_text(value)  # JSON inside a JSON string
    elif not isinstance(value, dict):
        thinking, text = split_reasoning(text, anywhere=True)
        if not text.strip() and thinking:
            raise Unparsable("the answer was cut off within its reasoning, or has nothing else")
        text = without_tagged(text).strip()
    if not text:
        raise Unparsable("the answer is empty, or has only quotations")
    if len(text) > MOST_CHARACTERS:
        raise Unparsable(f"the answer has {len(text):,} characters; the limit is {MOST_CHARACTERS:,}")
    return text


def _unwrapped(found: FoundObject) -> FoundObject:
    """The object within `{"judgement": {"ranking": …}}`."""
    inner = [value for value in found.value.values() if isinstance(value, dict) and FIELDS & set(value)]
    if not found.whole or FIELDS & set(found.value) or len(inner) != 1:
        return found
    return FoundObject(found.start, inner[0], found.end, whole=True)


def _tells(value: Mapping[str, Any]) -> bool:
    return any(name in value for name in (*RANKINGS, "scores"))


def _refuse_reversed(text: str, objects: Sequence[FoundObject]) -> None:
    """Raise if the words around the objects, or their fields, say that the worst comes first."""
    edges = [0, *(edge for found in objects for edge in (found.start, found.end)), len(text)]
    outside = " ".join(text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
    inside = [
        f"{name} {value if isinstance(value, str) and name not in ('reference', 'kind') else ''}".replace("_", " ")
        for found in objects
        for name, value in found.value.items()
    ]
    if any(REVERSED.search(words[:20_000]) for words in (outside, *inside)):
        raise Unparsable("it is not clear whether the best or the worst comes first")


def _from_objects(objects: Sequence[FoundObject], count: int) -> Judgement:
    notes: list[str] = []
    open_ones = [found.open_field for found in objects if found.open_field in RANKINGS]
    if open_ones:
        raise Unparsable("the answer was cut off within its ranking")
    if any(found.twice & FIELDS for found in objects):
        raise Unparsable("the answer has a field twice with different values")
    found = [item for item in objects if _tells(item.value)]
    ranked = [(item, tiers_of(ranking)) for item in found for ranking in _ranking_values(item.value)]
    if len(ranked) > MOST_RANKINGS or any(_plain(tiers) != _plain(ranked[0][1]) for _, tiers in ranked):
        raise Unparsable("the answer has several rankings that disagree")
    last = ranked[-1][0] if ranked else found[-1]
    value = last.value
    duplicates = _duplicates(value.get("duplicates"), count, notes)
    scores = _scores(value.get("scores"), count, notes)
    source: Literal["json", "cut json", "scores"] = "json" if last.whole else "cut json"
    if ranked:
        ranking = ranked[-1][1]
    else:
        ranking, source = _order_of_sums(scores, count), "scores"
        notes.append("no ranking is given; ranked by the sums of sub-scores")
    if not last.whole:
        notes.append("the JSON was cut off or malformed; its ranking is complete")
    kind = str(value.get("kind", ""))[:40].lower().replace("-ended", "").replace(" ended", "").strip()
    reference = value.get("reference")
    return Judgement(
        ranking=_complete(ranking, count, duplicates, notes),
        kind="open" if kind == "open" else "closed" if kind in ("closed", "close") else None,
        reference=reference.strip() if isinstance(reference, str) and reference.strip() else None,
        duplicates=duplicates,
        scores=scores,
        source=source,
        notes=notes,
    )


def _plain(tiers: Tiers) -> Tiers:
    return [sorted(tier) for tier in tiers]


def _ranking_values(value: Mapping[str, Any]) -> list[Any]:
    """The values an object gives as its ranking; `rank` or `order` only if nothing else is one."""
    given = [value[name] for name in RANKINGS[:3] if value.get(name) not in (None, [], "")]
    return given or [value[name] for name in RANKINGS[3:] if value.get(name) not in (None, [], "")][:1]


def _complete(tiers: Tiers, count: int, duplicates: list[list[int]], notes: list[str] | None = None) -> Tiers:
    """The checked order, with omitted duplicates added to the tiers of their twins."""
    if tiers is EVERYONE:
        return [list(range(1, count + 1))]
    seen: set[int] = set()
    for number in (number for tier in tiers for number in tier):
        if not 1 <= number <= count:
            raise Unparsable(f"candidate {number} is ranked, but there are {count}")
        if number in seen:
            raise Unparsable(f"candidate {number} is ranked twice")
        seen.add(number)
    result = [list(tier) for tier in tiers]
    for number in range(1, count + 1):
        if number in seen:
            continue
        twins = {twin for group in duplicates if number in group for twin in group} & seen
        places = [i for i, tier in enumerate(tiers) if twins & set(tier)]
        if len(places) != 1:
            raise Unparsable(f"candidate {number} is neither ranked nor the duplicate of one that is")
        result[places[0]].append(number)
        if notes is not None:
            notes.append(f"candidate {number} ranked with its duplicate")
    return result


def _duplicates(given: Any, count: int, notes: list[str]) -> list[list[int]]:
    """Groups of two or more candidates; groups that share one are one group."""
    if given in (None, [], "", {}):
        return []
    if isinstance(given, list) and not any(isinstance(group, list) for group in given):
        given = [given]  # a single group without brackets
    groups: list[set[int]] = []
    for group in given if isinstance(given, list) else [given]:
        try:
            members = {candidate_number(item) for item in group} if isinstance(group, list) else set()
        except Unparsable:
            members = set()
        if len(members) < 2 or not all(1 <= member <= count for member in members):
            notes.append(f"duplicates {short(str(group), 60)} do not name two candidates and are ignored")
            continue
        joined = [other for other in groups if other & members]
        groups = [other for other in groups if not other & members] + [members.union(*joined)]
    return [sorted(group) for group in groups]


def _scores(given: Any, count: int, notes: list[str]) -> dict[int, dict[str, float]]:
    """Sub-scores by candidate, from a list of objects or an object by candidate."""
    if isinstance(given, Mapping):
        given = [{"candidate": key, **value} for key, value in given.items() if isinstance(value, Mapping)]
    scores: dict[int, dict[str, float]] = {}
    repeated: set[int] = set()
    for item in given if isinstance(given, list) else []:
        try:
            number = candidate_number(item.get("candidate", item.get("id")))
            if not 1 <= number <= count:
                raise Unparsable(f"there are {count} candidates")
            values = {aspect: _sub_score(item.get(aspect)) for aspect in ASPECTS}
        except (Unparsable, AttributeError) as error:
            notes.append(f"scores {short(str(item), 60)} are ignored: {error}")
            continue
        repeated |= {number} & scores.keys()
        scores[number] = values
    for number in sorted(repeated):
        notes.append(f"candidate {number} is scored twice: both are ignored")
        del scores[number]
    return dict(sorted(scores.items()))


_SUB_SCORE = re.compile(rf"\s*([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)\s*(?:(?:/|out of)\s*{MOST}(?:\.0)?\s*)?")


def _sub_score(value: Any) -> float:
    """0 to 5; also "4" and "4/5"."""
    if isinstance(value, str) and (found := _SUB_SCORE.fullmatch(value[:40])):
        value = float(found[1])
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unparsable(f"a sub-score is {short(repr(value), 40)}")
    if not 0 <= value <= MOST:
        raise Unparsable(f"a sub-score of {value} is outside 0 to {MOST}")
    return float(value)


def _order_of_sums(scores: Mapping[int, Mapping[str, float]], count: int) -> Tiers:
    if len(scores) != count:
        raise Unparsable(f"no ranking is given, and valid sub-scores for only {len(scores)} of {count} candidates")
    sums = {number: sum(values.values()) for number, values in scores.items()}
    return [[n for n, total in sums.items() if total == level] for level in sorted(set(sums.values()), reverse=True)]
