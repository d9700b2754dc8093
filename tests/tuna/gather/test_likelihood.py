"""Laws of probabilistic ranking: the reference first, the likelier before the less likely, equal texts one, every
response either ranked or left out by a named rule; and `tuna rank` writes what `tuna train` reads."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tuna.cli import app
from tuna.data.records import read_records
from tuna.data.tokenization import tokenize_records
from tuna.gather.likelihood import RankedSet, RankingRules, rank_responses, ranking_figures
from tuna.gather.responses import Response, ResponseSet, write_responses
from tuna.models.loading import load_model
from tuna.score.scoring import score_dataset


def item(*responses: tuple[str, float, int, str], reference: str | None = None, name: str = "a") -> ResponseSet:
    """Responses as (text, sum of log-probabilities, tokens, finish reason)."""
    found = [Response(text=t, logprob_sum=s, tokens=n, finish_reason=r) for t, s, n, r in responses]
    return ResponseSet(id=name, prompt="Why?", reference=reference, responses=found)


def one(found: ResponseSet, **rules: Any) -> RankedSet:
    ranked, too_few = rank_responses([found], RankingRules(min_responses=1, **rules))
    assert not too_few
    return ranked[0]


def ranks(found: RankedSet) -> list[tuple[str, int]]:
    return [(candidate.text, candidate.rank) for candidate in found.candidates]


def test_the_reference_is_first_and_the_rest_goes_by_mean_logprob() -> None:
    found = item(("short", -2.0, 2, "stop"), ("long", -6.0, 12, "stop"), ("mid", -3.0, 4, "stop"), reference="Ref.")
    assert ranks(one(found)) == [("Ref.", 0), ("long", 1), ("mid", 2), ("short", 3)]
    # The exponent of the length turns the order: without it the sum counts.
    assert ranks(one(found, length_penalty=0.0)) == [("Ref.", 0), ("short", 1), ("mid", 2), ("long", 3)]
    without = item(("a", -2.0, 2, "stop"), ("b", -1.0, 2, "stop"))
    assert ranks(one(without)) == [("b", 0), ("a", 1)]


def test_equal_texts_are_one_and_the_likelier_is_kept() -> None:
    found = one(item(("two  words", -4.0, 2, "stop"), ("two words", -2.0, 2, "stop"), ("x", -3.0, 2, "stop")))
    assert ranks(found) == [("two words", 0), ("x", 1)]
    assert (found.candidates[0].copies, found.candidates[0].score) == (2, -1.0)
    assert [left.reason for left in found.left_out] == ["duplicate"]
    # A sample that equals the reference is the reference.
    found = one(item(("Ref.", -1.0, 2, "stop"), ("x", -3.0, 2, "stop"), reference=" Ref. "))
    assert ranks(found) == [("Ref.", 0), ("x", 1)]
    assert (found.candidates[0].source, found.candidates[0].copies) == ("reference", 2)
    # A whole copy is kept rather than a cut one, though that is likelier.
    found = one(item(("same", -1.0, 2, "length"), ("same", -2.0, 2, "stop")))
    assert (found.candidates[0].truncated, found.candidates[0].score, found.candidates[0].copies) == (False, -1.0, 2)


def test_ties_stay_ties() -> None:
    found = item(("a", -2.0, 2, "stop"), ("b", -3.0, 3, "stop"), ("c", -4.2, 4, "stop"), ("d", -8.0, 4, "stop"))
    assert ranks(one(found)) == [("a", 0), ("b", 0), ("c", 1), ("d", 2)]
    assert ranks(one(found, tie=0.1)) == [("a", 0), ("b", 0), ("c", 0), ("d", 1)]
    # A level is as wide as `tie`, not as long as a chain of small gaps.
    chain = item(*((str(i), -1.0 - 0.06 * i, 1, "stop") for i in range(5)))
    assert [rank for _, rank in ranks(one(chain, tie=0.1))] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("drop", [("whole", 0)]), ("keep", [("cut", 0), ("whole", 1)]), ("last", [("whole", 0), ("cut", 1)])],
)
def test_truncated_responses_follow_the_rule(rule: Any, expected: list[tuple[str, int]]) -> None:
    found = one(item(("cut", -1.0, 4, "length"), ("whole", -4.0, 4, "stop")), truncated=rule)
    assert ranks(found) == expected
    assert [left.reason for left in found.left_out] == (["truncated"] if rule == "drop" else [])


def test_short_and_empty_responses_are_left_out() -> None:
    found = one(item((" \n", -1.0, 1, "stop"), ("Yes", -1.0, 2, "stop"), ("Yes, it is", -6.0, 5, "stop")), min_tokens=3)
    assert ranks(found) == [("Yes, it is", 0)]
    assert [left.reason for left in found.left_out] == ["empty", "short"]


def test_records_with_too_few_responses_are_set_aside() -> None:
    sets = [item(("a", -1.0, 1, "stop"), name="one"), item(("a", -1.0, 1, "stop"), reference="b", name="two")]
    ranked, too_few = rank_responses(sets)
    assert ([found.item.id for found in ranked], [found.item.id for found in too_few]) == (["two"], ["one"])
    figures = ranking_figures(ranked, too_few)
    assert (figures["records"], figures["records_left_out"], figures["references"]) == (1, 1, 1)


def test_missing_logprobs_are_named() -> None:
    found = ResponseSet(id="q7", prompt="Why?", responses=[Response(text="Because.", tokens=2)])
    with pytest.raises(ValueError, match=r"'q7': responses\[0\] has no log-probabilities.*--score-with"):
        rank_responses([found])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"truncated": "first"}, "truncated = 'first'"),
        ({"tie": -0.1}, "tie = -0.1"),
        ({"min_tokens": 0}, "min_tokens = 0"),
        ({"min_responses": 0}, "min_responses = 0"),
        ({"length_penalty": math.inf}, "length_penalty = inf"),
    ],
)
def test_bad_rules_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankingRules(**wrong)


TEXTS = st.sampled_from(["", " ", "a", "b", "a ", "a  b", "a b", "c", "Ref."])
DRAWS = st.tuples(TEXTS, st.floats(-50, -0.01), st.integers(1, 9), st.sampled_from(["stop", "length"]))


@given(
    draws=st.lists(DRAWS, min_size=1, max_size=8),
    reference=st.sampled_from([None, "Ref.", "a b"]),
    rules=st.builds(
        RankingRules,
        length_penalty=st.sampled_from([0.0, 1.0, 1.3]),
        min_tokens=st.integers(1, 3),
        truncated=st.sampled_from(["drop", "last", "keep"]),
        tie=st.sampled_from([0.0, 0.5]),
        min_responses=st.just(1),
    ),
)
@settings(deadline=None, max_examples=200)
def test_nothing_is_lost_and_the_order_holds(draws: list[Any], reference: str | None, rules: RankingRules) -> None:
    ranked, too_few = rank_responses([item(*draws, reference=reference)], rules)
    found = (ranked or too_few)[0]
    samples = [candidate for candidate in found.candidates if candidate.source == "sample"]
    # A dropped text may have had copies; those are in left_out as duplicates.
    kept = len(found.candidates) - bool(reference)
    assert kept + len(found.left_out) == len(draws)
    texts = [" ".join(candidate.text.split()) for candidate in found.candidates]
    assert len(set(texts)) == len(texts)
    got = [candidate.rank for candidate in found.candidates]
    assert got == sorted(got) and set(got) == set(range(len(set(got))))
    assert not reference or got.count(0) == 1
    for better, worse in pairwise(samples):
        assert better.score is not None and worse.score is not None
        whole_first = rules.truncated == "last" and not better.truncated and worse.truncated
        assert better.score >= worse.score or whole_first
        if better.rank == worse.rank:
            assert better.score - worse.score <= rules.tie + 1e-12
    if ranked:
        read_records([found.row()])


def test_rank_reads_generated_responses_and_writes_records(tmp_path: Path) -> None:
    source, output, figures = tmp_path / "responses.jsonl", tmp_path / "ranked.jsonl", tmp_path / "figures.json"
    write_responses(
        source,
        [
            item(("x", -9.0, 3, "stop"), ("y", -3.0, 3, "stop"), ("z", -1.0, 3, "length"), reference="Ref.", name="p"),
            item(("only", -1.0, 1, "stop"), name="q"),
        ],
    )
    done = CliRunner().invoke(app, ["rank", "--data", str(source), "--output", str(output), "--json", str(figures)])
    assert done.exit_code == 0, done.output
    records = read_records(output).records
    assert [(record.id, record.responses, record.ranks) for record in records] == [("p", ["Ref.", "y", "x"], [0, 1, 2])]
    row = json.loads(output.read_text().splitlines()[0])
    assert [one["score"] for one in row["candidates"]] == [None, -1.0, -3.0]
    written = json.loads(figures.read_text())
    assert (written["records"], written["records_left_out"]) == (1, 1)
    assert written["responses_left_out"] == {"empty": 0, "short": 0, "duplicate": 0, "truncated": 1}


def test_score_with_a_model_ranks_plain_texts_as_the_kernels_do(tmp_path: Path) -> None:
    source, output = tmp_path / "plain.jsonl", tmp_path / "ranked.jsonl"
    texts = ["Blue.", "The sky is blue because of the air.", "Blue blue blue"]
    source.write_text(json.dumps({"id": "sky", "prompt": "Why is the sky blue?", "responses": texts}) + "\n")
    base = ["rank", "--data", str(source), "--output", str(output)]
    refused = CliRunner().invoke(app, base)
    assert refused.exit_code != 0 and "--score-with" in str(refused.exception)
    done = CliRunner().invoke(app, [*base, "--score-with", "tiny", "--template", "chat", "--length-penalty", "0.7"])
    assert done.exit_code == 0, done.output
    record = read_records(output).records[0]
    model, tokenizer = load_model("tiny")
    plain = record.model_copy(update={"responses": texts, "ranks": [0, 0, 0]})
    groups, _ = tokenize_records([plain], tokenizer, template="chat", max_length=512)
    scores = score_dataset(model, groups, length_penalty=0.7).scored.scores
    assert record.responses == [texts[i] for i in (-scores).argsort()]
    row = json.loads(output.read_text())
    assert [c["score"] for c in row["candidates"]] == pytest.approx(sorted(scores, reverse=True), rel=1e-5)
