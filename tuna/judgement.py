"""What a judge's answer says, read with tolerance for its form and none for its content.

Read are, in this order: a JSON object (also in a code fence, with trailing commas, in Python's quotes), the complete
`ranking` of a JSON object that was cut off, an order in plain text (`tuna.orders`), and, where no ranking is given
but valid sub-scores of all candidates are, the order of their sums. The order must then name every candidate once;
one that is missing must have been declared the duplicate of one that is there. Everything else is `Unparsable`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tuna.orders import EVERYONE, Tiers, Unparsable, candidate_number, order_in_text, tiers_of

__all__ = ["ASPECTS", "Judgement", "Unparsable", "parse_judgement"]

ASPECTS = ("correctness", "helpfulness", "clarity")
MOST = 5  # of a sub-score
RANKINGS = ("ranking", "final_ranking", "ranked_list", "rank", "order")
REFUSAL = re.compile(
    r"\b(?:I.?m sorry|I (?:cannot|can.t|am unable|will not|won.t)|as an AI|unable to (?:rank|compare))",
    re.IGNORECASE,
)


@dataclass
class Judgement:
    """A judge's answer. Candidates are numbered from 1 as they were shown.

    Attributes:
        ranking: tiers from best to worst; every candidate is in one.
        kind: "open" or "closed", None where not said.
        reference: the judge's own answer, None where it gave none.
        duplicates: groups declared to say the same.
        scores: the sub-scores of a candidate by aspect, 0 to 5; candidates without three valid ones are absent.
        source: where the ranking was read.
        notes: what was passed over or mended.
    """

    ranking: Tiers
    kind: Literal["open", "closed"] | None = None
    reference: str | None = None
    duplicates: list[list[int]] = field(default_factory=list)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    source: Literal["json", "cut json", "text", "scores"] = "json"
    notes: list[str] = field(default_factory=list)


def parse_judgement(text: str, count: int) -> Judgement:
    """Read a judge's answer about ``count`` candidates.

    Raises:
        Unparsable: it does not say plainly how they are ordered; the message says why.

    Example:
        >>> parse_judgement('```json\\n{"ranking": [[2], [1, 3]]}\\n```', 3).ranking
        [[2], [1, 3]]
        >>> parse_judgement("Ranking: 2 > 1", 3)
        Traceback (most recent call last):
            ...
        tuna.orders.Unparsable: candidate 3 is neither ranked nor the duplicate of one that is
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    if not text:
        raise Unparsable("the answer is empty")
    found = [value for value in _objects(text) if any(name in value for name in (*RANKINGS, "scores"))]
    try:
        if found:
            return _from_object(found, count)
        if (cut := _cut_ranking(text)) is not None:
            result = Judgement(_complete(tiers_of(cut), count, []), source="cut json", reference=_cut_reference(text))
            result.notes.append("the JSON was cut off or malformed; its ranking is complete")
            return result
        return Judgement(_complete(order_in_text(text), count, []), source="text")
    except Unparsable as error:
        if not found and REFUSAL.search(text[:400]):
            raise Unparsable(f"the judge refuses: {' '.join(text.split())[:120]}") from error
        raise


def _from_object(found: Sequence[Mapping[str, Any]], count: int) -> Judgement:
    notes: list[str] = []
    rankings = [(value, _ranking_value(value)) for value in found]
    ranked = [(value, tiers_of(ranking)) for value, ranking in rankings if ranking is not None]
    if any(_plain(tiers) != _plain(ranked[0][1]) for _, tiers in ranked):
        raise Unparsable("the answer holds several rankings that disagree")
    value = ranked[-1][0] if ranked else found[-1]
    duplicates = _duplicates(value.get("duplicates"), count, notes)
    scores = _scores(value.get("scores"), count, notes)
    if ranked:
        ranking, source = ranked[-1][1], "json"
    else:
        ranking, source = _order_of_sums(scores, count), "scores"
        notes.append("no ranking is given; it is that of the summed sub-scores")
    kind = str(value.get("kind", "")).lower().replace("-ended", "").replace(" ended", "").strip()
    reference = value.get("reference")
    return Judgement(
        ranking=_complete(ranking, count, duplicates, notes),
        kind="open" if kind == "open" else "closed" if kind in ("closed", "close") else None,
        reference=reference.strip() if isinstance(reference, str) and reference.strip() else None,
        duplicates=duplicates,
        scores=scores,
        source="json" if source == "json" else "scores",
        notes=notes,
    )


def _plain(tiers: Tiers) -> Tiers:
    return [sorted(tier) for tier in tiers]


def _ranking_value(value: Mapping[str, Any]) -> Any:
    return next((value[name] for name in RANKINGS if value.get(name) not in (None, [], "")), None)


def _complete(tiers: Tiers, count: int, duplicates: list[list[int]], notes: list[str] | None = None) -> Tiers:
    """The order with omitted duplicates put beside their twins, once it is sure to be one."""
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
            notes.append(f"candidate {number} stands with its duplicate")
    return result


def _duplicates(given: Any, count: int, notes: list[str]) -> list[list[int]]:
    """Groups of two or more candidates; groups that share one are one group."""
    if given in (None, [], "", {}):
        return []
    if isinstance(given, list) and not any(isinstance(group, list) for group in given):
        given = [given]  # one group, without its brackets
    groups: list[set[int]] = []
    for group in given if isinstance(given, list) else [given]:
        try:
            members = {candidate_number(item) for item in group} if isinstance(group, list) else set()
        except Unparsable:
            members = set()
        if len(members) < 2 or not all(1 <= member <= count for member in members):
            notes.append(f"duplicates {group!r} name no two candidates and are passed over")
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
            notes.append(f"scores {str(item)[:60]} are passed over: {error}")
            continue
        repeated |= {number} & scores.keys()
        scores[number] = values
    for number in sorted(repeated):
        notes.append(f"candidate {number} is scored twice: neither counts")
        del scores[number]
    return dict(sorted(scores.items()))


def _sub_score(value: Any) -> float:
    """0 to 5; also "4" and "4/5"."""
    if isinstance(value, str) and (found := re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(?:/\s*{MOST}(?:\.0)?\s*)?", value)):
        value = float(found[1])
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unparsable(f"a sub-score is {value!r}")
    if not 0 <= value <= MOST:
        raise Unparsable(f"a sub-score of {value} is outside 0 to {MOST}")
    return float(value)


def _order_of_sums(scores: Mapping[int, Mapping[str, float]], count: int) -> Tiers:
    if len(scores) != count:
        raise Unparsable(f"no ranking is given, and valid sub-scores for {len(scores)} of {count} candidates only")
    sums = {number: sum(values.values()) for number, values in scores.items()}
    return [[n for n, total in sums.items() if total == level] for level in sorted(set(sums.values()), reverse=True)]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in a text, strict or nearly."""
    decoder, at = json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = _closing(text, at)
            value = None if end is None else _nearly_json(text[at:end])
            at = at + 1 if value is None or end is None else end
        if isinstance(value, dict):
            yield value


def _closing(text: str, start: int) -> int | None:
    """One past the bracket that closes the one at ``start``, strings apart; None where there is none."""
    depth, quote, escaped = 0, "", False
    for i in range(start, len(text)):
        char = text[i]
        if quote:
            escaped = char == "\\" and not escaped
            if char == quote and not (i and text[i - 1] == "\\"):
                quote = ""
        elif char == '"':
            quote = char
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
            if depth == 0:
                return i + 1
    return None


def _nearly_json(text: str) -> Any:
    """A JSON object with trailing commas, raw line breaks in its texts, or in Python's spelling."""
    mended = re.sub(r",(\s*[}\]])", r"\1", text)
    try:
        return json.loads(mended, strict=False)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _cut_ranking(text: str) -> Any | None:
    """The value of `"ranking":` in a JSON object that is not whole, if the value is; None without such."""
    found = [match for name in RANKINGS[:3] for match in re.finditer(rf'["\']{name}["\']\s*:\s*(?=\[)', text)]
    if not found:
        return None
    start = found[-1].end()
    end = _closing(text, start)
    if end is None:
        raise Unparsable("the answer was cut off within its ranking")
    value = _nearly_json(text[start:end])
    if not isinstance(value, list) or not value:
        raise Unparsable(f"the ranking {text[start:end][:60]!r} cannot be read")
    return value


def _cut_reference(text: str) -> str | None:
    found = re.search(r'"reference"\s*:\s*("(?:[^"\\]|\\.)*")', text, re.DOTALL)
    if found is None:
        return None
    try:
        return str(json.loads(found[1], strict=False)).strip() or None
    except ValueError:
        return None
