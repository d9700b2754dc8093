# ruff: noqa: E501  # a row of data a line
"""Law of reading: nothing that belongs to a prompt, a turn or an answer is dropped without a word."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tuna.data.formats import FORMATS
from tuna.data.instructions import read_instructions
from tuna.data.problems import BadRecords
from tuna.data.records import Message, Record, read_records
from tuna.gather.responses import read_responses

SYSTEM, USER = {"role": "system", "content": "In French."}, {"role": "user", "content": "fruit?"}
EARLIER = [{"role": "user", "content": "2"}, {"role": "assistant", "content": "4"}]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


PAIR = {"chosen": "Pomme", "rejected": "Apple"}
# The answers of each shape, to stand beside a prompt.
ANSWERS: dict[str, dict[str, Any]] = {
    "tuna": {"responses": ["Pomme", "Apple"], "scores": [1, 0]},
    "preference": PAIR,
    "ranked_answers": {"answers": [{"answer": "Pomme", "rank": 1}, {"answer": "Apple", "rank": 2}]},
    "released": {"output": ["Pomme", "Apple"], "score": [1, 0]},
    "alpaca_eval": {"output": ["Pomme", "Apple"], "score": [1, 0], "generator": ["a", "b"]},
}
KEY = {"tuna": "prompt", "preference": "question", "ranked_answers": "question"}


def record_of(row: dict[str, Any], format: str = "auto") -> dict[str, Any]:
    (record,) = read_records([row], format=format).records
    assert record.responses == ["Pomme", "Apple"] and record.dense_ranks() == [0, 1]
    return record.model_dump(exclude_none=True, include={"prompt", "messages"})


@pytest.mark.parametrize("shape", FORMATS)
def test_every_shape_carries_what_stands_beside_its_prompt(shape: str) -> None:
    key = KEY.get(shape, "instruction")
    row = {key: "fruit?", **ANSWERS[shape]}
    for format in ("auto", shape):
        assert record_of(row, format) == {"prompt": "fruit?"}
        assert record_of({**row, "input": "a sort"}, format) == {"prompt": "fruit?\na sort"}
        assert record_of({**row, "input": "", "system": " ", "tools": [], "images": None}, format) == {
            "prompt": "fruit?"
        }
        for name in ("system", "system_prompt"):
            assert record_of({**row, name: "In French."}, format) == {"messages": [SYSTEM, USER]}
        for history in ([["2", "4"]], EARLIER):
            told = record_of({**row, "system": "In French.", "history": history}, format)
            assert told == {"messages": [SYSTEM, *EARLIER, USER]}
        for name in ("tools", "functions", "images", "chat_template_kwargs", "context"):
            with pytest.raises(BadRecords, match=f"field '{name}' has no place in a record"):
                record_of({**row, name: ["x"]}, format)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"prompt": "fruit?", "messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [USER], "system": "In French."}, [SYSTEM, USER]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "fruit?"}]}]}, [USER]),
    ],
)
def test_turns_keep_all_that_is_said(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert record_of({**row, **ANSWERS["tuna"]}) == {"messages": messages}


@pytest.mark.parametrize(
    ("row", "turns", "wanted"),
    [
        ({"prompt": [SYSTEM, USER]}, [USER], [SYSTEM, USER]),
        ({"prompt": [SYSTEM]}, [USER], [SYSTEM, USER]),
        ({"system": "In French."}, [USER], [SYSTEM, USER]),
        ({"system": "In French.", "prompt": "fruit?"}, [*EARLIER, USER], [SYSTEM, *EARLIER, USER]),
        ({"prompt": "fruit?"}, [*EARLIER, USER], [*EARLIER, USER]),
        ({"prompt": [USER]}, [SYSTEM, USER], [SYSTEM, USER]),
        ({"prompt": [*EARLIER, USER]}, [], [*EARLIER, USER]),
    ],
)
def test_the_conversation_of_a_pair_and_its_prompt_are_joined(
    row: dict[str, Any], turns: list[dict[str, str]], wanted: list[dict[str, str]]
) -> None:
    pair = {"chosen": [*turns, said("Pomme")], "rejected": [*turns, said("Apple")]}
    assert record_of({**row, **pair}) == {"messages": wanted}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "another?", "chosen": [USER, said("a")], "rejected": [USER, said("b")]}, "not part of the conversation"),
        ({"system": "In German.", "chosen": [SYSTEM, USER, said("a")], "rejected": [SYSTEM, USER, said("b")]}, "keep one"),
        ({"system": "a", "system_prompt": "b", "prompt": "p", **PAIR}, "disagree"),
        ({"prompt": "p", "instruction": "q", **PAIR}, "'prompt' and 'instruction' both hold a prompt"),
        ({"prompt": "p", "messages": [USER], "responses": ["a"]}, "'prompt' and 'messages' both hold a prompt"),
        ({"prompt": [USER], "input": "x", "responses": ["a"]}, "'input' cannot be joined"),
        ({"prompt": "p", "history": ["x"], **PAIR}, "'history' must be"),
        ({"prompt": "p", "chosen": [said("", tool_calls=CALL)], "rejected": [said("no")]}, r"chosen\[0\] has 'tool_calls'"),
        ({"prompt": "p", "chosen": [said("4", reasoning_content="2+2")], "rejected": [said("5")]}, "'reasoning_content'"),
        ({"messages": [USER, said("", tool_calls=CALL), {"role": "tool", "content": "22 C"}], "responses": ["22"]}, r"messages\[1\] has 'tool_calls'"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}], "responses": ["22"]}, "'tool_call_id'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "responses": ["a"]}, "a part that is not text"),
        ({"prompt": "p", "answers": [{"answer": "a", "rank": 1, "tool_calls": CALL}, {"answer": "b", "rank": 2}]}, r"answers\[0\] has 'tool_calls'"),
        ({"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2, "reasoning_content": "hm"}]}, r"answers\[1\] has 'reasoning_content'"),
        ({"prompt": "p", "answers": [{"answer": "a", "rank": 1, "score": 0.1}, {"answer": "b", "rank": 2, "score": 0.9}]}, "which one is better"),
        ({"prompt": "p", "passage": "It says so.", **PAIR}, "'passage' has no place in a record"),
        ({"prompt": "p", **PAIR, "score_chosen": 1.0, "score_rejected": 2.0}, "which one is better"),
    ],
)  # fmt: skip
def test_what_has_no_one_meaning_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecords, match=reason):
        read_records([row])


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"all_generated_responses": list("abcde"), "all_rm_scores": [1.0, 2.0, 3.0, 4.0, 5.0]}, ["all_generated_responses", "all_rm_scores"]),
        ({"reference": "La pomme"}, ["reference"]),
        ({"response_c": "Poire"}, ["response_c"]),
        ({"conversations": [{"from": "human", "value": "an earlier talk"}]}, ["conversations"]),
        ({"others": ["a text of more words than tags have", "another"]}, ["others"]),
        ({"allCompletions": ["Poire"]}, ["allCompletions"]),
        ({"turns": ["fruit?", "and another?"]}, ["turns"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["preference", "tuna"])
def test_responses_and_scores_that_the_shape_does_not_read_are_named(
    shape: str, more: dict[str, Any], names: list[str]
) -> None:
    row = {"prompt": "fruit?", **ANSWERS[shape], **more}
    with pytest.raises(BadRecords) as caught:
        read_records([row])
    assert all(repr(name) in str(caught.value) for name in names) and "would be dropped" in str(caught.value)
    assert record_of(row, shape) == {"prompt": "fruit?"}, "a shape that is named is read alone"


def test_what_is_said_twice_and_notes_are_no_loss() -> None:
    whole = [USER, said("Pomme")]
    ultrafeedback = {
        "prompt": "fruit?", "prompt_id": "x", "messages": whole, "chosen": whole, "rejected": [USER, said("Apple")],
        "score_chosen": 8.5, "score_rejected": 6.0, "chosen-model": "m", "source": "s", "tags": ["a", "b"],
    }  # fmt: skip
    assert record_of(ultrafeedback) == {"prompt": "fruit?"}
    ranked = {"prompt": "fruit?", "responses": ["Pomme", "Apple"], "ranks": [0, 1]}
    details = [{"score": -1.0, "tokens": 3, "source": "sample", "copies": 1, "truncated": False}] * 2
    assert record_of({**ranked, "candidates": details}) == {"prompt": "fruit?"}, "what tuna rank writes is read"
    assert record_of({**ranked, "reference": "Pomme", "difficulty": 3}) == {"prompt": "fruit?"}


def test_a_record_and_a_turn_made_in_python_drop_nothing_either() -> None:
    good = {"id": "a", "prompt": "p", "responses": ["x"]}
    for name in ("system", "tools", "input"):
        with pytest.raises(ValidationError, match=name):
            Record.model_validate({**good, name: "something"})
    with pytest.raises(ValidationError, match="tool_calls"):
        Message.model_validate({"role": "assistant", "content": "", "tool_calls": CALL})
    noted = Message.model_validate(
        {"role": "user", "content": "x", "timestamp": "now", "toxic": False, "tool_calls": None}
    )
    assert noted.model_dump() == {"role": "user", "content": "x"}


def test_instructions_and_responses_are_read_alike() -> None:
    def asked(row: dict[str, Any]) -> list[dict[str, str]]:
        return read_instructions([row])[0][0].turns()

    assert asked({"instruction": "fruit?", "system": "In French."}) == [SYSTEM, USER]
    assert asked({"instruction": "How long is the word?", "input": "is"})[0]["content"] == "How long is the word?\nis"
    assert asked({"instruction": "Add:\n2 + 2\n", "input": "2 + 2"})[0]["content"] == "Add:\n2 + 2\n"
    assert asked({"prompt": "fruit?", "input": "a sort"})[0]["content"] == "fruit?\na sort"
    assert asked({"question": "fruit?", "history": [["2", "4"]]}) == [*EARLIER, USER]
    assert asked({"prompt": "fruit?", "messages": [SYSTEM, USER]}) == [SYSTEM, USER]
    assert (
        asked({"instruction": "fruit?", "instances": [{"input": "a sort", "output": "o"}]})[0]["content"]
        == "fruit?\na sort"
    )
    for row in (
        {"prompt": "p", "tools": ["x"]},
        {"prompt": "p", "messages": [USER]},
        {"turns": ["p"], "images": ["x"]},
        {"question": "p", "text": "what the question is about"},
    ):
        with pytest.raises(BadRecords):
            read_instructions([row])
    for row in ({"prompt": "fruit?", "system": "In French."}, {"question": "fruit?", "systemPrompt": "In French."}):
        (found,), _ = read_responses([{**row, "responses": ["Pomme"]}])
        assert found.turns() == [SYSTEM, USER]
    with pytest.raises(BadRecords, match=r"responses\[0\] has 'tool_calls'"):
        read_responses([{"prompt": "fruit?", "responses": [{"text": "", "tool_calls": CALL}]}])


def test_turns_that_are_not_asked_are_told(caplog: pytest.LogCaptureFixture) -> None:
    (found,), _ = read_instructions([{"question_id": 7, "turns": ["first?", "second?"], "reference": ["1", "2"]}])
    assert found.prompt == "first?" and found.reference == "1" and "first of 2 turns" in caplog.text
