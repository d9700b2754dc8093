"""Law of the converters: every shape gives the same record, and the better response stays the better one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tuna.data.formats import FORMATS, convert_row, detect_format
from tuna.data.records import Record, read_records

USER = {"role": "user", "content": "2 + 2?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# Each: shape, row. Best is "4", then "four or five", worst is "5" (where there are three).
THREE: list[tuple[str, dict[str, Any]]] = [
    ("tuna", {"prompt": "2 + 2?", "responses": ["5", "4", "four or five"], "scores": [0, 9, 4]}),
    ("tuna", {"prompt": "2 + 2?", "responses": ["5", "4", "four or five"], "ranks": [2, 0, 1]}),
    ("tuna", {"prompt": "2 + 2?", "responses": ["5", "4", "four or five"], "ranks": [3, 1, 2]}),
    ("released", {"instruction": "2 + 2?", "output": ["4", "four or five", "5"], "score": [-0.1, -0.5, -2.0]}),
    (
        "alpaca_eval",
        {
            "instruction": "2 + 2?",
            "output": ["four or five", "5", "4"],
            "score": [0.5, 1e-7, 0.9],
            "generator": ["a", "b", "c"],
            "dataset": "x",
        },
    ),
    (
        "ranked_answers",
        {
            "prompt": "2 + 2?",
            "answers": [
                {"answer": "5", "rank": 3, "model": "a"},
                {"answer": "4", "rank": 1, "model": "b"},
                {"answer": "four or five", "rank": 2.0, "model": "c"},
            ],
        },
    ),
    (
        "ranked_answers",
        {
            "question": "2 + 2?",
            "responses": [
                {"response": "four or five", "rank": 1},
                {"text": "4", "rank": 0},
                {"answer": "5", "rank": 2},
            ],
        },
    ),
]
TWO: list[tuple[str, dict[str, Any]]] = [
    ("preference", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}),
    ("preference", {"question": "2 + 2?", "chosen": "4", "rejected": "5"}),
    ("preference", {"prompt": "2 + 2?", "chosen": [USER, said("4")], "rejected": [USER, said("5")]}),
]


@pytest.mark.parametrize(("shape", "row"), THREE + TWO)
def test_the_order_is_kept(shape: str, row: dict[str, Any]) -> None:
    assert detect_format(row) == shape
    for format in (shape, "auto"):
        (record,) = read_records([row], format=format).records
        assert record.prompt == "2 + 2?"
        assert record.responses[record.best()] == "4"
        assert record.responses[record.worst()] == "5"
        assert sorted(record.dense_ranks()) == list(range(len(record.responses)))


@pytest.mark.parametrize(("shape", "row"), THREE + TWO)
def test_absent_columns_of_parquet_are_absent_fields(shape: str, row: dict[str, Any]) -> None:
    padded = {"messages": None, "scores": None, "ranks": None, "generator": None, "chosen": None, "answers": None}
    assert detect_format({**padded, **row}) == shape
    assert convert_row({**padded, **row}, shape) == convert_row(row, shape)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER], "responses": ["4"]},
        {"prompt": [USER], "responses": ["4"]},
        {"prompt": [USER], "chosen": [said("4")], "rejected": [said("5")]},
        {"chosen": [USER, said("4")], "rejected": [USER, said("5")]},
        {"prompt": [USER], "answers": [{"answer": "4", "rank": 1}]},
    ],
)
def test_turns_become_messages(row: dict[str, Any]) -> None:
    (record,) = read_records([row]).records
    assert record.messages is not None and record.prompt is None
    assert [message.model_dump() for message in record.messages] == [USER]
    assert record.responses[record.best()] == "4"


def test_a_text_as_output_is_plain_fine_tuning_and_input_joins_the_prompt() -> None:
    (record,) = read_records([{"instruction": "Add.", "input": "2 + 2", "output": "4"}]).records
    assert (record.prompt, record.responses, record.scores, record.ranks) == ("Add.\n2 + 2", ["4"], None, None)
    assert read_records([{"instruction": "Add.", "input": "", "output": "4"}]).records[0].prompt == "Add."


@pytest.mark.parametrize(
    ("shape", "row", "reason"),
    [
        ("tuna", {"responses": ["x"]}, "field 'prompt' is missing"),
        ("tuna", {"prompt": "p"}, "field 'responses' is missing"),
        ("released", {"output": ["x"], "score": [1]}, "field 'instruction' is missing"),
        ("released", {"instruction": "p", "score": [1]}, "field 'output' is missing"),
        ("released", {"instruction": "p", "output": ["x", "y"]}, "2 responses need 'scores'"),
        ("released", {"instruction": "p", "output": ["x", "y"], "score": [1]}, "1 values for 2 responses"),
        ("preference", {"prompt": "p", "chosen": "x"}, "field 'rejected' is missing"),
        ("preference", {"chosen": "x", "rejected": "y"}, "field 'prompt' is missing"),
        ("preference", {"prompt": "p", "chosen": [USER], "rejected": [USER]}, "last turn of 'chosen'"),
        ("preference", {"prompt": "p", "chosen": [], "rejected": []}, "last turn of 'chosen'"),
        (
            "preference",
            {"chosen": [USER, said("4")], "rejected": [{**USER, "content": "other"}, said("5")]},
            "different conversations",
        ),
        ("ranked_answers", {"prompt": "p"}, "field 'responses' is missing"),
        ("ranked_answers", {"prompt": "p", "answers": "x"}, "'answers' must be a list"),
        ("ranked_answers", {"prompt": "p", "answers": ["x"]}, r"answers\[0\] must be an object"),
        ("ranked_answers", {"prompt": "p", "answers": [{"rank": 1}]}, r"answers\[0\] has no field 'answer'"),
        ("ranked_answers", {"prompt": "p", "answers": [{"answer": "x"}]}, r"answers\[0\] has no field 'rank'"),
        ("ranked_answers", {"answers": [{"answer": "x", "rank": 1}]}, "'prompt' or 'question' or 'instruction'"),
    ],
)
def test_what_a_row_lacks_is_named(shape: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"index 0: .*{reason}"):
        read_records([row], format=shape)


def test_unknown_format_and_rows_that_are_no_objects() -> None:
    with pytest.raises(ValueError, match="format = 'csv' is unknown"):
        convert_row({}, "csv")
    with pytest.raises(ValueError, match="not a list"):
        convert_row([], "tuna")
    assert detect_format([]) is None
    assert detect_format({"text": "x"}) is None


def test_every_format_is_covered_here() -> None:
    assert {shape for shape, _ in THREE + TWO} == set(FORMATS)


@pytest.mark.shared_data
def test_real_alpaca_eval_outputs() -> None:
    folder = Path(os.environ.get("TUNA_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
    path = folder / "alpaca_eval_ranked.jsonl"
    if not path.exists():
        pytest.skip(f"real data not found: {path}; set TUNA_SHARED_DATA")
    records: list[Record] = read_records(path).records
    assert len(records) == 602
    assert {len(record.responses) for record in records} == {5}
    for record in records:
        assert record.scores is not None
        assert record.scores[record.best()] == max(record.scores)
