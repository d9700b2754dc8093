"""Probabilistic ranking: responses ordered by the teacher's length-normalised log-probability.

The score of a response is `logprob_sum / tokens ** length_penalty`. The rules, in order:

1. The reference response of the dataset, if there is one, has rank 0 alone: it is the best by definition.
2. A response without text, or with fewer than `min_tokens` tokens, is excluded ("empty", "short").
3. Responses with the same text (up to surrounding white space) are merged: the reference is kept if it is among them,
   else the one with the highest score ("duplicate").
4. A truncated response (with a finish reason such as "length" or "content_filter") is excluded, ranked below all
   complete ones, or kept like any other: `truncated` = "drop", "last", "keep". The default drops it, since training
   would teach the model to end where it was cut.
5. The others follow by score, higher first. Scores within `tie` of the best of their level are tied.
6. A record with fewer than `min_responses` responses is excluded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from tuna.data.records import Record
from tuna.gather.responses import Response, ResponseSet

__all__ = ["Candidate", "LeftOut", "RankedSet", "RankingRules", "Truncated", "rank_responses", "ranking_figures"]

Truncated: TypeAlias = Literal["drop", "last", "keep"]
Reason: TypeAlias = Literal["empty", "short", "duplicate", "truncated"]


@dataclass(frozen=True, kw_only=True)
class RankingRules:
    """The parameters of the rules above.

    Raises:
        ValueError: a value outside its range.
    """

    length_penalty: float = field(
        default=1.0, metadata={"help": "Exponent of the length in a score, sum(log p) / tokens ** length_penalty."}
    )
    min_tokens: int = field(default=1, metadata={"help": "Leave out responses with fewer tokens."})
    truncated: Truncated = field(
        default="drop", metadata={"help": "Truncated responses: drop them, rank them last, or keep their scores."}
    )
    tie: float = field(default=0.0, metadata={"help": "Maximum difference between tied scores."})
    min_responses: int = field(default=2, metadata={"help": "Leave out records with fewer remaining responses."})

    def __post_init__(self) -> None:
        if not -float("inf") < self.length_penalty < float("inf"):
            raise ValueError(f"length_penalty = {self.length_penalty} must be finite")
        if self.truncated not in get_args(Truncated):
            raise ValueError(f"truncated = {self.truncated!r} is not one of {get_args(Truncated)}")
        if not 0 <= self.tie < float("inf"):
            raise ValueError(f"tie = {self.tie} must be finite and at least 0")
        for name in ("min_tokens", "min_responses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Candidate:
    """A ranked response.

    Attributes:
        text: as sampled, without surrounding white space.
        rank: dense from 0, the best; equal ranks are ties.
        score: the teacher's, None for an unscored reference.
        tokens: number of tokens of the score, None if unknown.
        source: "reference" or "sample".
        copies: number of responses with this text.
        truncated: whether it was cut.
    """

    text: str
    rank: int
    score: float | None
    tokens: int | None
    source: Literal["reference", "sample"]
    copies: int
    truncated: bool


@dataclass(frozen=True)
class LeftOut:
    """An excluded response, and the rule that excluded it."""

    text: str
    reason: Reason


@dataclass(frozen=True)
class RankedSet:
    """One instruction's candidates, best first, and its excluded responses."""

    item: ResponseSet
    candidates: list[Candidate]
    left_out: list[LeftOut]

    def row(self) -> dict[str, Any]:
        """A record for `tuna train`, with the candidates' scores in extra fields (ignored by readers of records)."""
        record = Record(
            id=self.item.id,
            prompt=self.item.prompt,
            messages=self.item.messages,
            responses=[candidate.text for candidate in self.candidates],
            ranks=[candidate.rank for candidate in self.candidates],
        )
        details = [
            {
                "score": candidate.score,
                "tokens": candidate.tokens,
                "source": candidate.source,
                "copies": candidate.copies,
                "truncated": candidate.truncated,
            }
            for candidate in self.candidates
        ]
        return record.model_dump(exclude_none=True) | {"candidates": details}


@dataclass
class _Entry:
    text: str
    score: float
    response: Response
    copies: int = 1

    @property
    def truncated(self) -> bool:
        return self.response.cut


def rank_responses(
    sets: Iterable[ResponseSet], rules: RankingRules | None = None
) -> tuple[list[RankedSet], list[RankedSet]]:
    """Rank the responses of each set by the rules of this module.

    Returns:
        The ranked sets in order, and those with too few responses left.

    Raises:
        ValueError: a response without log-probabilities that is not excluded by its text or length.
    """
    rules = rules or RankingRules()
    ranked = [_rank_one(item, rules) for item in sets]
    enough = [len(found.candidates) >= rules.min_responses for found in ranked]
    return (
        [found for found, keep in zip(ranked, enough, strict=True) if keep],
        [found for found, keep in zip(ranked, enough, strict=True) if not keep],
    )


def _rank_one(item: ResponseSet, rules: RankingRules) -> RankedSet:
    left_out: list[LeftOut] = []
    reference = (item.reference or "").strip()
    copies = 1
    entries: dict[str, _Entry] = {}
    for number, response in enumerate(item.responses):
        text = response.text.strip()
        if not text or (response.tokens is not None and response.tokens < rules.min_tokens):
            left_out.append(LeftOut(text, "short" if text else "empty"))
            continue
        key = _key(text)
        if reference and key == _key(reference):
            copies += 1
            left_out.append(LeftOut(text, "duplicate"))
            continue
        entry = _Entry(text, _score(item, number, rules.length_penalty), response)
        if key in entries:
            entry, lesser = _merged(entries[key], entry)
            left_out.append(LeftOut(lesser.text, "duplicate"))
        entries[key] = entry
    if rules.truncated == "drop":
        left_out += [LeftOut(entry.text, "truncated") for entry in entries.values() if entry.truncated]
        entries = {key: entry for key, entry in entries.items() if not entry.truncated}
    candidates = [Candidate(reference, 0, None, None, "reference", copies, False)] if reference else []
    candidates += _by_score(list(entries.values()), rules, first_rank=len(candidates))
    return RankedSet(item, candidates, left_out)


def _by_score(entries: Sequence[_Entry], rules: RankingRules, first_rank: int) -> list[Candidate]:
    def below(entry: _Entry) -> bool:
        return entry.truncated and rules.truncated == "last"

    rank, best = first_rank - 1, (False, float("inf"))
    candidates = []
    for entry in sorted(entries, key=lambda entry: (below(entry), -entry.score)):
        if below(entry) != best[0] or entry.score < best[1] - rules.tie:
            rank, best = rank + 1, (below(entry), entry.score)
        tokens = entry.response.tokens
        candidates.append(Candidate(entry.text, rank, entry.score, tokens, "sample", entry.copies, entry.truncated))
    return candidates


def _merged(one: _Entry, other: _Entry) -> tuple[_Entry, _Entry]:
    """The entry to keep (a complete one before a cut one, then the more likely), and the other."""
    kept, lesser = sorted((one, other), key=lambda entry: (entry.truncated, -entry.score))
    kept.copies = one.copies + other.copies
    return kept, lesser


def _key(text: str) -> str:
    return " ".join(text.split())


def _score(item: ResponseSet, number: int, length_penalty: float) -> float:
    response = item.responses[number]
    if response.logprob_sum is None or not response.tokens:
        raise ValueError(
            f"record {item.id!r}: responses[{number}] has no log-probabilities; score it with a model (--score-with)"
        )
    return float(response.logprob_sum / response.tokens**length_penalty)


def ranking_figures(ranked: Sequence[RankedSet], too_few: Sequence[RankedSet]) -> dict[str, Any]:
    """Effects of the rules as plain JSON values: numbers of records, candidates, ties, and excluded responses."""
    candidates = [candidate for found in ranked for candidate in found.candidates]
    levels = [len({candidate.rank for candidate in found.candidates}) for found in ranked]
    reasons = Counter(left.reason for found in (*ranked, *too_few) for left in found.left_out)
    scores = sorted(candidate.score for candidate in candidates if candidate.score is not None)
    return {
        "records": len(ranked),
        "records_left_out": len(too_few),
        "responses": len(candidates),
        "references": sum(candidate.source == "reference" for candidate in candidates),
        "truncated_kept": sum(candidate.truncated for candidate in candidates),
        "records_with_ties": sum(n < len(found.candidates) for n, found in zip(levels, ranked, strict=True)),
        "responses_left_out": {reason: reasons[reason] for reason in get_args(Reason)},
        "score_min": scores[0] if scores else None,
        "score_median": scores[len(scores) // 2] if scores else None,
        "score_max": scores[-1] if scores else None,
    }
