"""Laws of reading a judge: the table of answers; what is written is read back; no text makes it crash or guess."""

from __future__ import annotations

import contextlib
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tuna.gather.judge_answers import CASES, FULL, Tiers
from tests.tuna.gather.timing import processor_seconds
from tuna.gather.judge_answer.judgement import Judgement, Unparsable, parse_judgement


@pytest.mark.parametrize(("name", "count", "text", "expected"), CASES, ids=[case[0] for case in CASES])
def test_the_table(name: str, count: int, text: str, expected: Tiers | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(Unparsable, match=expected):
            parse_judgement(text, count)
    else:
        found = parse_judgement(text, count)
        assert [sorted(tier) for tier in found.ranking] == expected


def test_everything_else_it_says() -> None:
    found = parse_judgement(FULL, 3)
    assert (found.kind, found.reference, found.duplicates, found.source) == ("closed", "Four.", [[1, 3]], "json")
    assert found.scores[2] == {"correctness": 0, "helpfulness": 1, "clarity": 3}
    assert found.notes == ["candidate 3 ranked with its duplicate"]


def test_what_it_says_can_be_written() -> None:
    found = parse_judgement('{"reference": "half \\ud83d, whole \\ud83d\\ude00", "ranking": [2, 1]}', 2)
    assert found.reference == "half \ufffd, whole \U0001f600"


UNITS = [
    "{", "{{", "[", '{"a":', '{"a":1,', '{"ranking": [', '{"ranking": [[2], [1]]} ', "{ ", '"', "'", "\\", "Ranking",
    "Ranking:\n", "Ranking: ", " ", "\n", "<think>", "</think>", "> ", "```\n", "1. 2\n", "2 > ", "1, ", "=",
    "candidate ", "it has ",
    "Candidate 2 says:\n", "worst ", "worst to ", "all tied ", "ranking is ", "9", '{"reference": "\\u', "the ",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("start", ["", "Ranking: ", "Ranking:\n", '{"ranking": '])
def test_time_grows_with_the_length(start: str, unit: str) -> None:
    """What is repeated ten times as often takes not much more than ten times as long; the square would be a hundred."""

    def read(length: int) -> None:
        with contextlib.suppress(Unparsable):
            parse_judgement(start + unit * (length // len(unit)), 3)

    def seconds(length: int) -> float:
        return processor_seconds(lambda: read(length))

    assert seconds(80_000) < 0.5 + 25 * seconds(8_000)


@st.composite
def tiers(draw: st.DrawFn) -> tuple[int, Tiers]:
    count = draw(st.integers(1, 9))
    order = draw(st.permutations(range(1, count + 1)))
    cuts = draw(st.lists(st.booleans(), min_size=count - 1, max_size=count - 1))
    found: Tiers = [[order[0]]]
    for number, cut in zip(order[1:], cuts, strict=True):
        if cut:
            found.append([number])
        else:
            found[-1].append(number)
    return count, found


@given(tiers(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=200)
def test_what_is_written_is_read_back(case: tuple[int, Tiers], draw: random.Random) -> None:
    """Any order, in any of the ways to write it down."""
    count, expected = case
    label = draw.choice(["", "Candidate ", "Response #", "answer "])
    ways = [
        json.dumps({"kind": "open", "ranking": expected}),
        json.dumps({"ranking": [[f"{label}{n}" for n in tier] for tier in expected]}, indent=2),
        "So.\n```json\n" + json.dumps({"ranking": expected})[:-1] + ",}\n```",
        "Ranking: " + " > ".join(" = ".join(f"{label}{n}" for n in tier) for tier in expected),
        "Ranking: " + " < ".join(" = ".join(f"{label}{n}" for n in tier) for tier in expected[::-1]),
        "Ranking:\n" + "\n".join(f"{i}. " + " and ".join(f"{label}{n}" for n in t) for i, t in enumerate(expected, 1)),
    ]
    for text in ways:
        assert [sorted(t) for t in parse_judgement(text, count).ranking] == [sorted(t) for t in expected], text


@given(st.text(max_size=200) | st.sampled_from([case[2] for case in CASES]), st.integers(1, 5), st.data())
@settings(deadline=None, max_examples=300)
def test_nothing_crashes_it_and_what_it_returns_is_an_order(text: str, count: int, data: st.DataObject) -> None:
    """Any text, also the answers of the table cut anywhere and with something in the middle."""
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.sampled_from(["", "}", "[", '"', "2", ">", "\n"])) + text[at:]
    try:
        found = parse_judgement(text[: data.draw(st.integers(0, len(text)))], count)
    except Unparsable:
        return
    assert isinstance(found, Judgement)
    assert sorted(n for tier in found.ranking for n in tier) == list(range(1, count + 1))
