"""Laws of the gate: of any answer comes a valid value or the reason why there is none, fresh or out of a journal."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tuna.gather.timing import processor_seconds
from tuna.gather.api.answers import parse_choices, reported_usage, stored_choices
from tuna.gather.api.bodies import UnusableAnswer, clean_text, parse_json
from tuna.gather.api.budget import Usage
from tuna.gather.api.reasoning import split_reasoning


def chat(text: Any, tokens: list[tuple[str, Any]] | None, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    content = None if tokens is None else [{"token": token, "logprob": value} for token, value in tokens]
    logprobs = None if content is None else {"content": content}
    choice = {"message": {"content": text, **message}, "finish_reason": finish, "logprobs": logprobs}
    return {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}


def read(reply: dict[str, Any], api: Any = "chat", logprobs: bool = True) -> dict[str, Any]:
    (choice,) = parse_choices(api, logprobs=logprobs)(reply)["choices"]
    assert isinstance(choice, dict)
    return choice


THOUGHT = [("<think>", -0.1), ("hm", -9.0), ("</think>", -0.1)]
APPLE = [("App", -0.5), ("le", -0.25)]
END = ("<|im_end|>", -0.125)
REASONED: list[tuple[str, dict[str, Any], list[float]]] = [
    ("a parser took it out", chat("Apple", [*THOUGHT, *APPLE], reasoning_content="hm"), [-0.5, -0.25]),
    ("under another name", chat("Apple", [*THOUGHT, ("\n\n", -1), *APPLE, END], reasoning="hm"), [-0.5, -0.25, -0.125]),
    ("without a word", chat("Apple", [*THOUGHT, *APPLE]), [-0.5, -0.25]),
    ("in the text", chat("<think>hm</think>Apple", [*THOUGHT, *APPLE]), [-0.5, -0.25]),
    ("opened in the prompt", chat("hm</think>Apple", [*THOUGHT[1:], *APPLE]), [-0.5, -0.25]),
    ("without tags", chat("Apple", [("hm", -9), *APPLE, END], reasoning_content="hm"), [-0.5, -0.25, -0.125]),
    ("the text in the thinking too", chat("Apple", [*THOUGHT[:1], *APPLE, *THOUGHT[2:], *APPLE]), [-0.5, -0.25]),
    ("a stop text cut off", chat("Apple", [*THOUGHT, *APPLE, ("END", -2)], reasoning_content="hm"), [-0.5, -0.25, -2]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "reply", "expected"), REASONED, ids=[case[0] for case in REASONED])
def test_tokens_of_reasoning_do_not_count(name: str, reply: dict[str, Any], expected: list[float]) -> None:
    choice = read(reply)
    assert choice["text"] == "Apple" and choice["logprobs"] == expected and choice["tokens"] == len(expected)
    if name != "without a word":
        assert "hm" in choice.get("reasoning", "hm")


def test_tokens_of_reasoning_without_log_probabilities_do_not_count_either() -> None:
    reply = chat("Apple", None, reasoning_content="hm")
    assert read(reply, logprobs=False)["tokens"] is None
    reply["usage"]["completion_tokens_details"] = {"reasoning_tokens": 7}
    assert read(reply, logprobs=False)["tokens"] == 2


NONE = "log-probabilit"
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("none at all", chat("Apple", None), NONE),
    ("an empty list", chat("Apple", []), "any token"),
    ("a sentinel", chat("Apple", [("App", -0.5), ("le", -9999.0)]), "-9999.*missing"),
    ("the least float", chat("Apple", [("Apple", -3.4e38)]), "missing"),
    ("minus infinity", chat("Apple", [("Apple", -math.inf)]), "missing"),
    ("a long integer", chat("Apple", [("Apple", -(10**400))]), "missing"),
    ("a positive number", chat("Apple", [("Apple", 5.0)]), "above 0"),
    ("infinity", chat("Apple", [("Apple", 10**400)]), "above 0"),
    ("NaN", chat("Apple", [("Apple", math.nan)]), "NaN"),
    ("null", chat("Apple", [("App", None), ("le", -1.0)]), "NoneType"),
    ("true", chat("Apple", [("Apple", True)]), "bool"),
    ("text", chat("Apple", [("Apple", "-1")]), "str"),
    ("more tokens than bytes", chat("Apple", [("", -1.0)] * 30), "30 tokens"),
    ("the first tokens only", chat("Apple pie", APPLE), "first 2 tokens only"),
    ("reasoning that cannot be told apart", chat("Apple", [("x", -1), ("y", -1)], reasoning_content="hm"), "reasoning"),
    ("no text, at the limit", chat(None, None, "length", reasoning_content="hm"), "max_tokens went into its reasoning"),
    ("no text, at the limit, without reasoning", chat(None, None, "length"), "max_tokens were used up"),
    ("reasoning only", chat("<think>hm", [("hm", -1)], "length"), "max_tokens went into its reasoning"),
    ("an error with status 200", {"error": {"message": "busy", "code": "overloaded"}}, r"busy \(overloaded\)"),
    ("a filter", chat(None, None, "content_filter"), "filter withheld"),
    ("a tool call", chat(None, None, "tool_calls", tool_calls=[{}]), "calls a tool"),
    ("a tool call beside an empty text", chat("", [("a", -1)], tool_calls=[{"id": "x"}]), "calls a tool"),
    ("reasoning only, and an end", chat("<think>hm", [("hm", -1)], "stop"), 'no text .finish_reason "stop"'),
    ("a picture", chat([{"type": "image_url"}], None), "no text"),
    ("an object", chat({}, None), "no text"),
]


@pytest.mark.parametrize(("name", "reply", "words"), BAD, ids=[case[0] for case in BAD])
def test_what_is_no_answer_is_told(name: str, reply: dict[str, Any], words: str) -> None:
    with pytest.raises(UnusableAnswer, match=words) as raised:
        read(reply)
    # What cost all its tokens for nothing is not asked again at the same price.
    assert raised.value.again == (name not in ("reasoning only", "a filter") and "at the limit" not in name)


def test_completions_in_arrays() -> None:
    def reply(tokens: Any, values: Any) -> dict[str, Any]:
        return {"choices": [{"text": "Apple", "logprobs": {"tokens": tokens, "token_logprobs": values}}]}

    assert read(reply(["App", "le"], [-1, -2.0]), "completions")["logprobs"] == [-1.0, -2.0]
    assert read(reply(["Name", " a", "App", "le"], [None, -9, -1, -2]), "completions")["logprobs"] == [-1.0, -2.0]
    assert read(reply(None, [-1, -2]), "completions")["logprobs"] == [-1.0, -2.0]
    for tokens, values in ((["App"], [-1, -2]), (["App", "le"], [None, -1]), (["App", "le"], 3), ([], [])):
        with pytest.raises(UnusableAnswer):
            read(reply(tokens, values), "completions")


def test_bytes_that_are_parts_of_characters() -> None:
    octets = "né".encode()
    content = [{"token": "\\x", "logprob": -1.0, "bytes": [octet]} for octet in octets]
    before = {"token": "</think>", "logprob": -9.0, "bytes": list(b"</think>")}
    reply = chat("né", [])
    reply["choices"][0]["logprobs"] = {"content": [before, *content]}
    assert read(reply)["logprobs"] == [-1.0] * 3


def test_a_text_before_a_tool_call_is_cut_by_it() -> None:
    choice = read(chat("I look it up.", None, "stop", tool_calls=[{"id": "x"}]), logprobs=False)
    assert choice["text"] == "I look it up." and choice["finish_reason"] == "tool_calls"


def test_usable_choices_are_kept_and_the_others_told() -> None:
    good, bad = chat("Apple", APPLE)["choices"], chat("Pear", [("Pear", -9999.0)])["choices"]
    answer = parse_choices("chat", logprobs=True)({"choices": [*bad, *good, "x"]})
    assert [choice["text"] for choice in answer["choices"]] == ["Apple"]
    assert len(answer["left_out"]) == 2 and "choice 0" in answer["left_out"][0]


def test_fields_are_read_each_for_itself() -> None:
    reply = chat("half \ud83d, nothing \x00", None, finish=["stop"])
    reply |= {"model": {"name": "m"}, "usage": {"prompt_tokens": 5, "completion_tokens": 1.5}}
    answer = parse_choices("chat", logprobs=False)(reply)
    assert answer["choices"] == [
        {"text": "half \ufffd, nothing \ufffd", "finish_reason": None, "tokens": None, "logprobs": None}
    ]
    assert answer["model"] is None and reported_usage(reply) is None
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Apple"}]
    choice = read(chat(parts, None), logprobs=False)
    assert choice["text"] == "Apple" and choice["reasoning"] == "hm"


@pytest.mark.parametrize("count", [1.5, -1, True, "5", None, {}, 10**400, math.inf, math.nan, 10**8])
def test_counts_that_are_none(count: Any) -> None:
    assert reported_usage({"usage": {"prompt_tokens": count, "completion_tokens": 1}}) is None
    assert reported_usage({"usage": {"prompt_tokens": 1, "completion_tokens": count}}) is None
    assert reported_usage({"usage": {"prompt_tokens": 1, "completion_tokens": 2}}) == Usage(1, 2)


STORED: list[tuple[Any, str | None]] = [
    ({"text": "a", "finish_reason": "stop", "tokens": 2, "logprobs": [-1.0, -2.0]}, None),
    ({"text": "a", "finish_reason": "stop", "tokens": 2, "logprobs": [-1.0, -9999.0]}, "missing"),
    ({"text": "a", "finish_reason": "stop", "tokens": 2, "logprobs": [5.0]}, "above 0"),
    ({"text": "a", "finish_reason": "stop", "tokens": 0, "logprobs": []}, "any token"),
    ({"text": "<think>a</think>b", "tokens": 1, "logprobs": [-1.0]}, "reasoning"),
    ({"text": "a", "tokens": 1, "logprobs": None}, "no log-probabilities"),
    ({"text": 3}, "no text"),
    ("a", "not an object"),
]


@pytest.mark.parametrize(("choice", "words"), STORED)
def test_a_journal_of_an_earlier_version_is_read_by_the_same_rules(choice: Any, words: str | None) -> None:
    answer = {"model": "m", "choices": [choice]}
    if words is None:
        assert stored_choices(logprobs=True)(answer) == answer
    else:
        with pytest.raises(UnusableAnswer, match=words):
            stored_choices(logprobs=True)(answer)


def test_old_counts_and_surrogates_lose_no_answer() -> None:
    (choice,) = stored_choices(logprobs=False)({"choices": [{"text": "\ud83d", "tokens": 1.5}]})["choices"]
    assert choice == {"text": "\ufffd", "finish_reason": None, "tokens": None, "logprobs": None}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["message", "content", "text", "logprobs", "tokens", "token_logprobs", "logprob", "type", "bytes"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.lists(values, max_size=3), st.sampled_from(["chat", "completions"]), st.booleans())
@settings(deadline=None, max_examples=300)
def test_whatever_comes_is_a_value_that_can_be_written_and_read_again(choices: Any, api: Any, logprobs: bool) -> None:
    try:
        answer = parse_choices(api, logprobs=logprobs)({"choices": choices, "model": choices})
    except UnusableAnswer:
        return
    text = json.dumps(answer, allow_nan=False, ensure_ascii=False).encode()
    assert stored_choices(logprobs=logprobs)(parse_json(text))["choices"] == answer["choices"]


def test_numbers_of_json_are_bounded() -> None:
    found = parse_json(b'{"a": 1%s, "b": -1%s, "c": 123456789012345678, "d": 1e999}' % (b"0" * 400, b"0" * 9000))
    assert found == {"a": math.inf, "b": -math.inf, "c": 123456789012345678, "d": math.inf}


def test_text_is_text() -> None:
    assert clean_text("a\ud83d\x00b\U0001f600") == "a\ufffd\ufffdb\U0001f600"


@pytest.mark.parametrize("unit", ["<think>", "</think>", "<think></think>", "a</think>", "<"])
def test_splitting_takes_time_that_grows_with_the_length(unit: str) -> None:
    def split(count: int) -> None:
        for anywhere in (False, True):
            split_reasoning(unit * count, anywhere=anywhere)

    def seconds(count: int) -> float:
        return processor_seconds(lambda: split(count))

    assert seconds(80_000) < 0.1 + 20 * seconds(8_000)
