"""Laws of `tuna generate`: what comes back is what the endpoint said, in the order asked, whatever went wrong on
the way; a killed run ends with the same file and pays for nothing twice."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fuzz import endpoint
from tests.tuna.gather.commands import FAST, invoke, killed_and_resumed, rows
from tests.tuna.gather.misbehaving import Fault, Misbehaving
from tuna.data.instructions import read_instructions
from tuna.gather.api.answers import parse_choices
from tuna.gather.api.endpoint import UnusableAnswer
from tuna.gather.local_scores import score_responses
from tuna.gather.responses import Response, ResponseSet, read_responses
from tuna.gather.teacher import NoLogprobs
from tuna.models.loading import load_model


def instructions(folder: Path, count: int) -> str:
    path = folder / "instructions.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "prompt": f"What is {i} + {i}?"}) + "\n" for i in range(count)))
    return str(path)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_from_instructions_to_responses(api: str, tmp_path: Path) -> None:
    with Misbehaving() as server:
        result = invoke(
            "generate", "--instructions", instructions(tmp_path, 5), "--output", str(tmp_path / "run"),
            "--api", api, "--base-url", server.url, "--n", "3", "--keep-token-logprobs", *FAST,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert server.calls == 6  # with the probe
        assert [request.get("n") for request in server.bodies] == [None, 3, 3, 3, 3, 3]
    found = rows(tmp_path / "run" / "responses.jsonl")
    assert [row["id"] for row in found] == [f"q{i}" for i in range(5)]
    for row in found:
        assert len(row["responses"]) == 3 and row["model"] == "teacher" and row["sampling"]["temperature"] == 1.0
        for response in row["responses"]:
            values = response["logprobs"]
            assert response["finish_reason"] == "stop" and response["tokens"] == len(values) == 5
            assert response["logprob_sum"] == math.fsum(values) and response["logprob_mean"] == math.fsum(values) / 5
    assert not (tmp_path / "run" / "failed.jsonl").exists()


FAULTY = [
    Fault(429, {"retry-after": "0.02"}),
    Fault(500),
    Fault(raw=b""),
    Fault(raw=b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{\"choices\": ["),
    Fault(answer=lambda good: json.dumps(good)[:-20]),
    Fault(answer=lambda good: {**good, "choices": []}),
    Fault(answer=lambda good: {**good, "choices": [{**choice, "logprobs": None} for choice in good["choices"]]}),
]  # fmt: skip


def test_all_faults_at_once_lose_nothing(tmp_path: Path) -> None:
    """Every request meets some faults first; the file is that of an endpoint without fault, and each is paid once."""
    common = ["generate", "--instructions", instructions(tmp_path, 21), "--api", "completions", *FAST]

    def script(count: int, body: dict[str, Any]) -> Fault | None:
        number = sum(map(ord, body["prompt"]))
        return FAULTY[(number + count) % len(FAULTY)] if count < 1 + number % 3 else None

    with Misbehaving() as good:
        assert invoke(*common, "--base-url", good.url, "--output", str(tmp_path / "good")).exit_code == 0
    with Misbehaving(script) as bad:
        result = invoke(*common, "--base-url", bad.url, "--output", str(tmp_path / "bad"), "--concurrency", "5")
        assert result.exit_code == 0, result.output
        assert set(bad.paid.values()) == {1} and len(bad.paid) == 22
        again = invoke(*common, "--base-url", bad.url, "--output", str(tmp_path / "bad"))
        assert again.exit_code == 0 and set(bad.paid.values()) == {1}
    texts = [(tmp_path / run / "responses.jsonl").read_bytes() for run in ("good", "bad")]
    assert texts[0] == texts[1]


def test_what_cannot_be_had_is_set_aside_and_tried_again(tmp_path: Path) -> None:
    common = ["generate", "--instructions", instructions(tmp_path, 4), "--output", str(tmp_path / "run"), *FAST]
    ill = True

    def script(count: int, body: dict[str, Any]) -> Fault | None:
        return Fault(500) if ill and "2 + 2" in json.dumps(body) else None

    with Misbehaving(script) as server:
        first = invoke(*common, "--base-url", server.url, "--max-attempts", "2")
        assert first.exit_code == 1 and "set aside" in first.output
        (failed,) = rows(tmp_path / "run" / "failed.jsonl")
        assert failed["id"] == "q2" and "500" in failed["reason"] and failed["record"]["prompt"] == "What is 2 + 2?"
        assert [row["id"] for row in rows(tmp_path / "run" / "responses.jsonl")] == ["q0", "q1", "q3"]
        ill = False
        assert invoke(*common, "--base-url", server.url, "--max-attempts", "2").exit_code == 0
        assert set(server.paid.values()) == {1}
    assert [row["id"] for row in rows(tmp_path / "run" / "responses.jsonl")] == ["q0", "q1", "q2", "q3"]
    assert not (tmp_path / "run" / "failed.jsonl").exists()


def test_an_endpoint_that_ignores_n_is_asked_for_the_rest(tmp_path: Path) -> None:
    def one(good: dict[str, Any]) -> dict[str, Any]:
        return {**good, "choices": good["choices"][:1]}

    with Misbehaving(lambda count, body: Fault(answer=one)) as server:
        result = invoke(
            "generate", "--instructions", instructions(tmp_path, 3), "--output", str(tmp_path / "run"),
            "--base-url", server.url, "--seed", "7", *FAST,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        asked = [(body["n"], body["seed"]) for body in server.bodies if "n" in body and "0 + 0" in json.dumps(body)]
        assert asked == [(4, 7), (3, 8), (2, 9), (1, 10)]
    for row in rows(tmp_path / "run" / "responses.jsonl"):
        assert len({response["text"] for response in row["responses"]}) == 4


def generate(server: Misbehaving, tmp_path: Path, *more: str, count: int = 3) -> Any:
    common = ["generate", "--instructions", instructions(tmp_path, count), "--output", str(tmp_path / "run"), *FAST]
    return invoke(*common, "--base-url", server.url, *more)


def test_an_endpoint_that_refuses_n_is_asked_one_at_a_time(tmp_path: Path) -> None:
    """Learnt once; a rerun pays for nothing, and one that refuses for another reason is told so."""

    def script(count: int, body: dict[str, Any]) -> Fault | None:
        if "2 + 2" in json.dumps(body):
            return Fault(400, body='{"error": {"message": "of another kind"}}')
        return Fault(400, body='{"error": {"message": "n > 1 is not supported"}}') if body.get("n", 1) > 1 else None

    with Misbehaving(script) as server:
        result = generate(server, tmp_path, "--concurrency", "1")
        assert result.exit_code == 1, result.output
        assert sum(body.get("n", 1) > 1 for body in server.bodies) == 1
        assert [row["id"] for row in rows(tmp_path / "run" / "responses.jsonl")] == ["q0", "q1"]
        assert "of another kind" in rows(tmp_path / "run" / "failed.jsonl")[0]["reason"]
        paid = sum(server.paid.values())
        assert paid == 1 + 2 * 4
        generate(server, tmp_path, "--concurrency", "1")
        assert sum(server.paid.values()) == paid


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (413, "n too large"),
        (501, "no"),
        (500, "n > 1 is not implemented"),
        (405, "only one completion choice"),
        (200, "n must be 1"),
    ],
)
def test_n_is_refused_in_many_ways(status: int, words: str, tmp_path: Path) -> None:
    refused = Fault(status, body=json.dumps({"error": {"message": words}}))
    with Misbehaving(lambda count, body: refused if body.get("n", 1) > 1 else None) as server:
        result = generate(server, tmp_path, "--concurrency", "1", "--max-attempts", "1", count=1)
        assert result.exit_code == 0, result.output
    assert len(rows(tmp_path / "run" / "responses.jsonl")[0]["responses"]) == 4


@pytest.mark.parametrize("status", [403, 404, 401])
def test_a_run_that_ends_early_keeps_what_the_journal_answers(status: int, tmp_path: Path) -> None:
    """The first record is refused for itself, or the key is not taken any more: the others were paid for."""
    down = False

    def script(count: int, body: dict[str, Any]) -> Fault | None:
        return Fault(status if down else 400) if "0 + 0" in json.dumps(body) else None

    with Misbehaving(script) as server:
        assert generate(server, tmp_path, "--concurrency", "1", count=4).exit_code == 1
        down = True
        result = generate(server, tmp_path, "--concurrency", "1", count=4)
        assert result.exit_code == (3 if status == 401 else 1), result.output
    assert [row["id"] for row in rows(tmp_path / "run" / "responses.jsonl")] == ["q1", "q2", "q3"]


def each(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Fault:
    return Fault(answer=lambda good: {**good, "choices": [change(choice) for choice in good["choices"]]})


def test_choices_that_cannot_be_used_are_drawn_again_and_the_others_kept(tmp_path: Path) -> None:
    def sentinel(choice: dict[str, Any]) -> dict[str, Any]:
        spoilt = {"content": [{"token": "t", "logprob": -9999.0}] * 3}
        return {**choice, "logprobs": spoilt} if choice["index"] == 0 else choice

    with Misbehaving(lambda count, body: each(sentinel) if body.get("n", 1) > 1 else None) as server:
        result = generate(server, tmp_path, count=1)
        assert result.exit_code == 0, result.output
        assert [body.get("n") for body in server.bodies] == [None, 4, 1]
    (row,) = rows(tmp_path / "run" / "responses.jsonl")
    assert len(row["responses"]) == 4 and all(-40 < response["logprob_sum"] < 0 for response in row["responses"])


@pytest.mark.parametrize("way", ["sentinel", "reasoning"])
def test_the_probe_tells_a_missing_value_from_missing_values(way: str, tmp_path: Path) -> None:
    """And asks a model that thinks for as many tokens as its responses will have."""

    def change(choice: dict[str, Any]) -> dict[str, Any]:
        if way == "sentinel":
            return {**choice, "logprobs": {"content": [{"token": "t", "logprob": -9999.0}]}}
        message = {"content": None, "reasoning_content": "hm"}
        return {**choice, "message": message, "finish_reason": "length", "logprobs": None}

    with Misbehaving(lambda count, body: each(change) if body["max_tokens"] == 4 else None) as server:
        result = generate(server, tmp_path, "--max-tokens", "60")
        assert result.exit_code == 0, result.output
        assert [body["max_tokens"] for body in server.bodies[:2]] == [4, 60]
        assert server.calls == (4 if way == "sentinel" else 5)


def test_log_probabilities_of_no_token_are_none_at_the_probe(tmp_path: Path) -> None:
    with Misbehaving(lambda count, body: each(lambda choice: {**choice, "logprobs": {"content": []}})) as server:
        result = generate(server, tmp_path)
        assert isinstance(result.exception, NoLogprobs) and "any token" in str(result.exception) and server.calls == 1


def test_reasoning_is_kept_beside_the_response(tmp_path: Path) -> None:
    def think(choice: dict[str, Any]) -> dict[str, Any]:
        return {**choice, "message": {"content": f"<think>hm</think>{choice['message']['content']}"}}

    with Misbehaving(lambda count, body: each(think)) as server:
        assert generate(server, tmp_path, "--no-logprobs", "--n", "1").exit_code == 0
    for row in rows(tmp_path / "run" / "responses.jsonl"):
        (response,) = row["responses"]
        assert response["reasoning"] == "hm" and response["text"].startswith("answer ")


def test_what_the_limit_used_up_is_not_asked_again_at_the_same_price(tmp_path: Path) -> None:
    def used_up(choice: dict[str, Any]) -> dict[str, Any]:
        return {**choice, "message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "length"}

    with Misbehaving(lambda count, body: each(used_up) if "1 + 1" in json.dumps(body) else None) as server:
        result = generate(server, tmp_path, "--no-logprobs")
        assert result.exit_code == 1 and server.calls == 3
    assert "--max-tokens" in rows(tmp_path / "run" / "failed.jsonl")[0]["reason"]


def test_a_cut_response_is_cut_by_whatever_cut_it(tmp_path: Path) -> None:
    """By a filter, say: ranked, it would teach to end there."""
    reasons = iter(["content_filter", "STOP", "eos_token", "SAFETY"])
    with Misbehaving(
        lambda count, body: each(lambda c: {**c, "finish_reason": next(reasons)}) if "n" in body else None
    ) as server:
        assert generate(server, tmp_path, count=1).exit_code == 0
    ranked = tmp_path / "ranked.jsonl"
    arguments = ["rank", "--data", str(tmp_path / "run" / "responses.jsonl"), "--output", str(ranked)]
    assert invoke(*arguments).exit_code == 0
    (row,) = rows(ranked)
    assert len(row["responses"]) == 2 and not any(candidate["truncated"] for candidate in row["candidates"])
    assert invoke(*arguments, "--truncated", "last").exit_code == 0
    (row,) = rows(ranked)
    assert [candidate["truncated"] for candidate in row["candidates"]] == [False, False, True, True]


@pytest.mark.parametrize(
    "response",
    [
        {"text": "a", "tokens": 2, "logprob_sum": -9999.5},
        {"text": "a", "tokens": 2, "logprob_sum": 5.0},
        {"text": "a", "tokens": -2, "logprob_sum": -5.0},
        {"text": "a", "tokens": 2, "logprob_sum": -1.0, "logprobs": [-9999.0, -1.0]},
    ],
)
def test_files_of_responses_are_held_to_the_same_rules(response: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "p", "responses": [{"text": "b"}, response]}) + "\n")
    with pytest.raises(ValueError, match=r"responses\[1\]"):
        read_responses(path)


def test_a_command_that_could_not_work_claims_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    common = ["generate", "--instructions", instructions(tmp_path, 2), "--output", str(tmp_path / "run"), *FAST]
    result = invoke(*common, "--base-url", "https://api.openai.com/v1")
    assert "$OPENAI_API_KEY is not set" in str(result.exception) and not (tmp_path / "run").exists()
    with Misbehaving(
        lambda count, body: Fault(answer=lambda good: "<html>") if "wrong" in body["model"] else None
    ) as server:
        wrong = invoke(*common, "--base-url", server.url.replace("/v1", ""), "--max-attempts", "1", "--model", "wrong")
        assert wrong.exit_code == 3, wrong.output
        assert invoke(*common, "--base-url", server.url).exit_code == 0


@pytest.mark.parametrize(
    "extra",
    ['{"n": 0}', '{"n": 1.5}', '{"max_tokens": 1e400}', '{"a": NaN}', "[1]", "{", "[" * 9000, '{"stream": true}'],
)
def test_bad_extra_fields_are_a_user_error(extra: str, tmp_path: Path) -> None:
    with Misbehaving() as server:
        result = generate(server, tmp_path, "--extra", extra)
        assert isinstance(result.exception, ValueError) and "--extra" in str(result.exception) and server.calls == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_endpoint_ends_no_run(seed: int) -> None:
    """More of these: ``python -m tests.fuzz --only endpoint``."""
    endpoint.case(seed)


@pytest.mark.parametrize("way", ["null", "status"])
def test_an_endpoint_without_logprobs_is_told_before_anything_is_paid(way: str, tmp_path: Path) -> None:
    def script(count: int, body: dict[str, Any]) -> Fault | None:
        if not body.get("logprobs"):
            return None
        if way == "status":
            return Fault(400, body='{"error": {"message": "logprobs are not supported"}}')
        return Fault(answer=lambda good: {**good, "choices": [{**c, "logprobs": None} for c in good["choices"]]})

    common = ["--instructions", instructions(tmp_path, 3), *FAST]
    with Misbehaving(script) as server:
        common += ["--base-url", server.url]
        refused = invoke("generate", *common, "--output", str(tmp_path / "a"))
        assert server.calls == 1
        assert isinstance(refused.exception, ValueError)
        assert "--score-with" in str(refused.exception) and "--no-logprobs" in str(refused.exception)
        assert invoke("generate", *common, "--output", str(tmp_path / "a"), "--no-logprobs").exit_code == 0
        assert "logprob_mean" not in rows(tmp_path / "a" / "responses.jsonl")[0]["responses"][0]
        scored = invoke("generate", *common, "--output", str(tmp_path / "c"), "--score-with", "tiny")
        assert scored.exit_code == 0, scored.output
    sets, _ = read_responses(tmp_path / "c" / "responses.jsonl")
    assert all(item.scored_by == "tiny" and response.logprob_mean for item in sets for response in item.responses)


def test_a_local_model_scores_as_plain_torch_does() -> None:
    """Sums over response and end token (none for a cut one), against separate sequences and full logits."""
    model, tokenizer = load_model("tiny")
    texts = [("It is four.", "stop"), ("It is fo", "length"), ("", "stop"), ("It is four. Or five.", "stop")]
    item = ResponseSet(id="a", prompt="2 + 2?", responses=[Response(text=t, finish_reason=f) for t, f in texts])
    (scored,) = score_responses([item], model, tokenizer, name="tiny", template="none")
    prompt = [tokenizer.bos_token_id, *tokenizer("2 + 2?", add_special_tokens=False)["input_ids"]]
    for (text, finish), response in zip(texts, scored.responses, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * (finish == "stop")
        logits = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        expected = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))
        assert response.tokens == len(ids)
        assert response.logprob_sum == pytest.approx(expected, abs=1e-4)
        assert response.logprob_mean == pytest.approx(expected / len(ids), abs=1e-4)


def test_a_prompt_too_long_for_the_local_model_shows_before_anything_is_paid(tmp_path: Path) -> None:
    with Misbehaving() as server:
        result = invoke(
            "generate", "--instructions", instructions(tmp_path, 3), "--output", str(tmp_path / "run"),
            "--base-url", server.url, "--score-with", "tiny", "--score-max-length", "5", *FAST,
        )  # fmt: skip
        assert isinstance(result.exception, ValueError) and "max_length = 5" in str(result.exception)
        assert server.calls == 0


def test_dry_run_and_budget(tmp_path: Path) -> None:
    common = ["generate", "--instructions", instructions(tmp_path, 10), "--output", str(tmp_path / "run"), *FAST]
    priced = ["--price-input", "1", "--price-output", "10", "--max-tokens", "100"]
    with Misbehaving() as server:
        common += ["--base-url", server.url]
        dry = invoke(*common, *priced, "--dry-run")
        assert dry.exit_code == 0 and server.calls == 0 and not (tmp_path / "run").exists()
        cells = dict(re.findall(r"│ (\w[^│]*?) +│ ([\d.,]+) +│", dry.output.replace(",", "")))
        assert cells["calls"] == "11" and cells["response tokens (at most)"] == str(4 + 10 * 4 * 100)
        prompt = int(cells["prompt tokens (estimate)"])
        assert float(cells["cost (at most)"]) == pytest.approx((prompt + 10 * 4004) / 1e6, abs=1e-4)
        short = invoke(*common, *priced, "--max-calls", "4")
        assert short.exit_code == 3 and "max_calls = 4" in short.output and server.calls == 4
        assert len(rows(tmp_path / "run" / "responses.jsonl")) == 3
        assert "answered by the journal" in invoke(*common, *priced, "--dry-run").output
        assert invoke(*common, *priced).exit_code == 0 and server.calls == 11
        mixed = invoke(*common, *priced, "--temperature", "0.5")
        assert "temperature: 1.0 before, 0.5 now" in str(mixed.exception) and server.calls == 11


def test_killed_once_it_ends_the_same(tmp_path: Path) -> None:
    check_kills(tmp_path, 24, kills=1)


@pytest.mark.slow
def test_killed_ten_times_it_ends_the_same(tmp_path: Path) -> None:
    check_kills(tmp_path, 100, kills=10)


def test_ctrl_c_finishes_what_is_in_flight(tmp_path: Path) -> None:
    """So nothing at all is paid twice; the run says that it ended early, and the next one ends it."""
    arguments = ["generate", "--instructions", instructions(tmp_path, 60), *FAST, "--concurrency", "3"]
    arguments += ["--output", str(tmp_path / "run")]
    with Misbehaving(delay=0.3) as server:
        arguments += ["--base-url", server.url]
        process = subprocess.Popen([sys.executable, "-m", "tuna", *arguments], stdout=subprocess.PIPE, text=True)
        while sum(server.paid.values()) < 5 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 3 and "interrupted" in output, output
        done = len(rows(tmp_path / "run" / "responses.jsonl"))
        assert done + 1 == sum(server.paid.values()) < 61
        server.delay = 0.0
        assert invoke(*arguments).exit_code == 0
        assert len(server.paid) == 61 and set(server.paid.values()) == {1}


def check_kills(tmp_path: Path, count: int, kills: int) -> None:
    """kill -9 at random points: the file is the uninterrupted run's; what is paid twice was in flight at a kill."""
    arguments = ["generate", "--instructions", instructions(tmp_path, count), *FAST, "--concurrency", "3"]
    with Misbehaving(delay=0.02) as server:
        arguments += ["--base-url", server.url]
        killed_and_resumed(arguments, tmp_path / "killed", server, kills, seed=count)
        twice = sum(paid - 1 for paid in server.paid.values())
        assert len(server.paid) == count + 1 and twice <= 3 * kills
        paid = sum(server.paid.values())
        assert invoke(*arguments, "--output", str(tmp_path / "whole")).exit_code == 0
        assert sum(server.paid.values()) == paid + count + 1
    files = [(tmp_path / run / "responses.jsonl").read_bytes() for run in ("killed", "whole")]
    assert files[0] == files[1] and files[0].count(b"\n") == count


def test_extra_fields_win_and_null_takes_one_away(tmp_path: Path) -> None:
    with Misbehaving() as server:
        result = invoke(
            "generate", "--instructions", instructions(tmp_path, 1), "--output", str(tmp_path / "run"), *FAST,
            "--base-url", server.url, "--extra", '{"max_tokens": null, "max_completion_tokens": 9, "top_p": 0.5}',
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        body = server.bodies[1]
    assert body["max_completion_tokens"] == 9 and body["top_p"] == 0.5 and "max_tokens" not in body


ANSWERS: dict[str, Any] = {
    "no object": [],
    "no choices": {},
    "choices no list": {"choices": "a"},
    "choice no object": {"choices": ["a"]},
    "null content": {"choices": [{"message": {"content": None}}]},
    "no message": {"choices": [{"text": "a"}]},
    "a null log-probability": {
        "choices": [{"message": {"content": "a"}, "logprobs": {"content": [{"logprob": None}]}}]
    },
    "text for a log-probability": {
        "choices": [{"message": {"content": "a"}, "logprobs": {"content": [{"logprob": "-1"}]}}]
    },
}


@pytest.mark.parametrize("name", ANSWERS)
def test_unusable_answers(name: str) -> None:
    with pytest.raises(UnusableAnswer):
        parse_choices("chat", logprobs=True)(ANSWERS[name])


SHAPES = [
    ({"id": "a", "prompt": "p"}, ("a", "p", None)),
    ({"prompt": "p"}, ("x-1", "p", None)),
    ({"id": 7, "instruction": "do", "input": "this", "output": "done"}, ("7", "do\nthis", "done")),
    ({"instruction": "do", "input": "", "output": ["a", "b"]}, ("x-1", "do", None)),
    (
        {"id": "s", "name": "n", "instruction": "do", "instances": [{"input": "i", "output": "o"}]},
        ("s", "do\ni", "o"),
    ),
    ({"question_id": 3, "category": "generic", "turns": ["q", "then"]}, ("3", "q", None)),
    ({"question_id": 3, "text": "q"}, ("3", "q", None)),
]


@pytest.mark.parametrize(("row", "expected"), SHAPES)
def test_shapes_of_instructions(row: dict[str, Any], expected: tuple[str, str, str | None], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    ((found,), problems) = read_instructions(path)
    assert (found.id, found.prompt, found.reference) == expected and not problems


def test_bad_instructions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = ['{"prompt": "p", "id": "a"}', '{"prompt": ""}', "{", '{"foo": 1}', '{"prompt": "p", "id": "a"}', "[]"]
    path.write_text("\n".join(lines))
    found, problems = read_instructions(path, on_bad="skip")
    assert [item.id for item in found] == ["a"] and [problem.line for problem in problems] == [2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="line 2"):
        read_instructions(path)
