"""Problems with rows are said in one way, whoever reads them."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from tuna.data.instructions import read_instructions
from tuna.data.problems import SHOWN, Problem, problem_lines
from tuna.data.records import read_records
from tuna.system.validation import place, reason


def test_the_first_problems_are_shown_and_the_others_counted() -> None:
    problems = [Problem("a.jsonl", line, "is wrong") for line in range(SHOWN + 2)]
    lines = problem_lines(problems)
    assert lines[0] == "left out: a.jsonl line 0: is wrong" and len(lines) == SHOWN + 1
    assert lines[-1] == "… and 2 more left out"
    assert len(problem_lines(problems[:SHOWN])) == SHOWN and problem_lines([]) == []


def test_records_and_instructions_say_the_same_of_the_same_fault() -> None:
    rows = [{"id": "a", "prompt": 3, "responses": ["x"]}]
    (record,) = read_records(rows, format="tuna", on_bad="skip").problems
    (instruction,) = read_instructions(rows, on_bad="skip")[1]
    assert record.reason == instruction.reason == "prompt must be text, not 3"


class Example(BaseModel, extra="forbid"):
    count: int
    names: list[str]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": "x", "names": []}, "count Input should be a valid integer, unable to parse string as an integer"),
        ({"count": 1}, "names is missing"),
        ({"count": 1, "names": ["a", 2]}, "names[1] must be text, not 2"),
        ({"count": 1, "names": [], "more": 1}, "more is unknown"),
    ],
)
def test_errors_of_pydantic_are_given_in_plain_words(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Example.model_validate(given)
    (detail,) = raised.value.errors()
    assert f"{place(detail['loc'])} {reason(detail)}" == words
