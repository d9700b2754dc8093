"""Laws of `tuna serve`, asked over a real socket by the real client: answers are the model's, log-probabilities the
reference's, a seed repeats them, a stream adds up to the whole, and what is not served is refused in OpenAI's words."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.tuna.serve.live_server import live_server
from tuna.data.records import Record
from tuna.data.tokenization import encode_prompts, tokenize_records
from tuna.models.decoding import Decoding, Row
from tuna.models.loading import tiny_model
from tuna.serve import Engine
from tuna.serve.engine import Busy, RowTask
from tuna_kernels import pack_groups
from tuna_kernels.integrations.transformers import prepare_model, score_groups

PROMPT = "What is the best thing to do"
CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a prime."}]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model, tokenizer = tiny_model(seed=3)
    return prepare_model(model.double().eval()), tokenizer


@pytest.fixture(scope="module")
def served(tiny: tuple[Any, Any]) -> Iterator[tuple[str, Engine]]:
    with live_server(*tiny) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: tuple[str, Engine]) -> openai.OpenAI:
    return openai.OpenAI(base_url=served[0], api_key="unused", max_retries=0)


def reference(tiny: tuple[Any, Any], ids: list[int]) -> torch.Tensor:
    """[T - 1, V] log-probabilities in float64 of what follows each token."""
    with torch.no_grad():
        return tiny[0](torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tuna"


def test_completion_logprobs_equal_the_references(client: openai.OpenAI, tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, n=2, max_tokens=12, seed=4, temperature=0.8, logprobs=3, echo=True
    )
    prompt = encode_prompts(tokenizer, [PROMPT])[0]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 24)
    assert answer.choices[0].text != answer.choices[1].text
    for choice in answer.choices:
        found: Any = choice.logprobs
        assert (choice.finish_reason, choice.text[: len(PROMPT)]) == ("length", PROMPT)
        assert found.tokens[: len(prompt)] == [tokenizer.decode([token]) for token in prompt]
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        ids = prompt + _ids_of(tiny, prompt, found.token_logprobs[len(prompt) :])
        assert found.tokens == [tokenizer.decode([token]) for token in ids]
        wanted = reference(tiny, ids)
        for place in range(1, len(ids)):
            assert found.token_logprobs[place] == pytest.approx(wanted[place - 1, ids[place]].item(), rel=1e-8)
            values = sorted(found.top_logprobs[place].values(), reverse=True)
            assert values[0] == pytest.approx(wanted[place - 1].max().item(), rel=1e-8)
        for token, offset, following in zip(found.tokens, found.text_offset, found.text_offset[1:], strict=False):
            if "\ufffd" not in choice.text[offset:following] and token != "<s>":
                assert choice.text[offset:following] == token


def _ids_of(tiny: tuple[Any, Any], prompt: list[int], logprobs: list[float]) -> list[int]:
    """The tokens that have these log-probabilities: names alone do not tell the pieces of a character apart."""
    ids = list(prompt)
    for value in logprobs:
        following = reference(tiny, [*ids, 0])[-1]
        ids.append(int((following - value).abs().argmin()))
    return ids[len(prompt) :]


def test_chat_logprobs_equal_the_references(client: openai.OpenAI, tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    ids = list(prompt)
    content: Any = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    for entry in content:
        following = reference(tiny, [*ids, 0])[-1]
        best = int(following.argmax())
        assert entry.token == tokenizer.decode([best])
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert entry.logprob == pytest.approx(following[best].item(), rel=1e-8)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(following.topk(2).values.tolist(), rel=1e-8)
        ids.append(best)
    assert answer.choices[0].message.content == tokenizer.decode(ids[len(prompt) :])
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)


def test_echo_alone_scores_a_text(client: openai.OpenAI, tiny: tuple[Any, Any]) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    found: Any = answer.choices[0].logprobs
    ids = encode_prompts(tiny[1], [PROMPT])[0]
    wanted = reference(tiny, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert answer.choices[0].text == PROMPT
    assert found.token_logprobs[1:] == pytest.approx(wanted, rel=1e-8)
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_a_seed_repeats_an_answer_and_company_does_not_change_it(client: openai.OpenAI) -> None:
    def ask(seed: int | None, **more: Any) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10, seed=seed, **more)
        return [choice.text for choice in answer.choices]

    first = ask(5, n=3)
    assert ask(5, n=3) == first and len(set(first)) == 3
    with ThreadPoolExecutor(8) as pool:  # float64: other shapes of the products do not reach the text
        together = list(pool.map(ask, [5, 6, 7, 5, 8, 9, 5, 10]))
    assert together[0] == together[3] == together[6] == first[:1]
    assert len({*map(tuple, together)}) == 6
    assert ask(None) != ask(None)


def test_waiting_requests_share_batches(served: tuple[str, Engine], client: openai.OpenAI) -> None:
    before = served[1].batches
    with ThreadPoolExecutor(12) as pool:
        list(
            pool.map(
                lambda seed: client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, seed=seed), range(12)
            )
        )
    assert served[1].batches - before < 12


def test_prompts_may_be_several_and_token_ids(client: openai.OpenAI, tiny: tuple[Any, Any]) -> None:
    ids = encode_prompts(tiny[1], [PROMPT, "Hello"])
    texts = client.completions.create(model="tiny", prompt=[PROMPT, "Hello"], n=2, max_tokens=5, seed=1)
    tokens = client.completions.create(model="tiny", prompt=ids, n=2, max_tokens=5, seed=1)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in texts.choices] == [choice.text for choice in tokens.choices]
    one = client.completions.create(model="tiny", prompt=ids[0], n=2, max_tokens=5, seed=1)
    assert [choice.text for choice in one.choices] == [choice.text for choice in texts.choices[:2]]


@pytest.mark.parametrize("stop", [None, "in", ["zzz", " the"]])
def test_a_completion_stream_adds_up_to_the_whole(client: openai.OpenAI, stop: Any) -> None:
    settings: Any = {
        "model": "tiny", "prompt": PROMPT, "n": 2, "max_tokens": 60, "seed": 11, "logprobs": 1, "echo": True,
        "stop": stop,
    }  # fmt: skip
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    for choice in whole.choices:
        mine = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert len(mine) > 2
        assert "".join(part.text for part in mine) == choice.text
        assert [part.finish_reason for part in mine if part.finish_reason] == [choice.finish_reason]
        found: list[Any] = [part.logprobs for part in mine]
        wanted: Any = choice.logprobs
        assert [token for part in found for token in part.tokens] == wanted.tokens
        assert [offset for part in found for offset in part.text_offset] == wanted.text_offset
        summed = [value for part in found for value in part.token_logprobs]
        assert summed[1:] == pytest.approx(wanted.token_logprobs[1:], rel=1e-8)


def test_a_chat_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": CHAT, "n": 2, "max_tokens": 30, "seed": 3, "logprobs": True}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True))
    for choice in whole.choices:
        mine = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert [part.delta.role for part in mine if part.delta.role] == ["assistant"]
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert choice.logprobs is not None
        tokens = [entry.token for part in mine for entry in (part.logprobs and part.logprobs.content) or ()]
        assert tokens == [entry.token for entry in choice.logprobs.content or ()]
        assert mine[-1].finish_reason == choice.finish_reason


def test_stop_texts_end_answers(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 2}
    whole = client.completions.create(**settings).choices[0]
    stop = whole.text[20:23]
    cut = client.completions.create(**settings, stop=[stop]).choices[0]
    assert (cut.finish_reason, cut.text) == ("stop", whole.text[: whole.text.index(stop)])


def test_chat_answers_have_a_default_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=CHAT, seed=0)
    assert answer.usage is not None and answer.usage.completion_tokens <= 8  # as the server was started


def test_rank_scores_equal_the_kernels_and_the_references(served: tuple[str, Engine], tiny: tuple[Any, Any]) -> None:
    responses = ["A prime is 7.", "Nine", "A prime is 9, I think.", "Nine", ""]
    asked = {"messages": CHAT, "responses": responses, "length_penalty": 0.5, "logprobs": True}
    answer = httpx.post(f"{served[0]}/rank", json=asked).raise_for_status().json()
    record = Record(id="a", messages=CHAT, responses=responses, ranks=[0] * 5)
    group = tokenize_records([record], tiny[1], template="chat", max_length=4096)[0][0].group
    with torch.no_grad():
        scores = score_groups(tiny[0], pack_groups([group]), length_penalty=0.5).scores.tolist()
    results = answer["results"]
    assert [result["score"] for result in results] == pytest.approx(scores, rel=1e-8)
    assert answer["order"] == sorted(range(5), key=lambda i: (-scores[i], i))
    assert results[1]["rank"] == results[3]["rank"]  # equal responses tie
    assert [results[i]["rank"] for i in answer["order"]] == sorted(result["rank"] for result in results)
    for result, response in zip(results, group.responses, strict=True):
        ids = [*group.prompt.tolist(), *response.tolist()]
        wanted = reference(tiny, ids)[len(group.prompt) - 1 :].gather(1, torch.tensor(response)[:, None])[:, 0]
        assert result["token_ids"] == response.tolist()
        assert result["token_logprobs"] == pytest.approx(wanted.tolist(), rel=1e-8)
        assert result["score"] == pytest.approx(float(wanted.sum()) / len(response) ** 0.5, rel=1e-8)
    assert answer["usage"]["computed_tokens"] < answer["usage"]["unshared_tokens"]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["open", "closed"]},
        "why": {"type": "string", "maxLength": 6},
        "ranking": {"type": "array", "items": {"type": "integer", "enum": [1, 2, 3]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["kind", "why", "ranking"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_structured_answers_keep_to_their_schema(
    client: openai.OpenAI, tiny: tuple[Any, Any], temperature: float
) -> None:
    """A random model, which left alone would hardly write a brace, answers in JSON of the schema."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "judgement", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, n=3, seed=1, temperature=temperature, max_tokens=200, response_format=form,
        logprobs=True,
    )  # fmt: skip
    prompt = tiny[1].apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content or "")
        assert list(found) == ["kind", "why", "ranking"] and found["kind"] in ("open", "closed")
        assert len(found["why"]) <= 6 and 2 <= len(found["ranking"]) <= 3 and set(found["ranking"]) <= {1, 2, 3}
        # The log-probabilities are the model's own, not those of what the schema leaves.
        first = choice.logprobs and choice.logprobs.content and choice.logprobs.content[0].logprob
        following = reference(tiny, [*prompt, 0])[-1]
        assert float((following - (first or 0.0)).abs().min()) < 1e-8
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError, match="JSON schema not supported"):
        client.chat.completions.create(model="tiny", messages=CHAT, response_format=wrong)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", {"model": "other", "prompt": "a"}, 404, "'other' does not exist"),
        ("completions", {"model": "tiny"}, 400, "prompt"),
        ("completions", {"model": "tiny", "prompt": ""}, None, ""),
        ("completions", {"model": "tiny", "prompt": []}, 400, "prompt"),
        ("completions", {"model": "tiny", "prompt": [1024]}, 400, "token 1024"),
        ("completions", {"model": "tiny", "prompt": "a", "max_tokens": 5000}, 400, "4096 positions"),
        ("completions", {"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "needs echo"),
        ("completions", {"model": "tiny", "prompt": "a", "n": 0}, 400, "n:"),
        ("completions", {"model": "tiny", "prompt": "a", "top_p": 0}, 400, "top_p"),
        ("completions", {"model": "tiny", "prompt": "a", "stop": ""}, 400, "stop"),
        ("completions", {"model": "tiny", "prompt": "a", "best_of": 3}, 400, "best_of"),
        ("completions", {"model": "tiny", "prompt": "a", "min_p": 0.1}, 400, "min_p"),
        ("completions", {"model": "tiny", "prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty"),
        ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "tiny", "messages": CHAT, "top_logprobs": 2}, 400, "needs logprobs"),
        ("chat/completions", {"model": "tiny", "messages": CHAT, "tools": []}, 400, "tools"),
        (
            "chat/completions",
            {"model": "tiny", "messages": CHAT, "response_format": {"type": "json_schema"}},
            400,
            "needs json_schema.schema",
        ),
        ("rank", {"prompt": "a"}, 400, "responses"),
        ("rank", {"responses": ["a"]}, 400, "exactly one of prompt and messages"),
        ("rank", {"prompt": "a", "responses": ["b"], "template": "nope"}, 400, "template = 'nope'"),
        ("nowhere", {}, 404, "Not Found"),
    ],
)
def test_what_is_not_served_is_refused(
    served: tuple[str, Engine], path: str, body: dict[str, Any], status: int | None, words: str
) -> None:
    answer = httpx.post(f"{served[0]}/{path}", json=body)
    if status is None:
        assert answer.status_code == 200  # an empty prompt is the beginning-of-sequence token
        return
    error = answer.json()["error"]
    assert answer.status_code == status
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_broken_json_is_a_clear_error(served: tuple[str, Engine]) -> None:
    answer = httpx.post(f"{served[0]}/completions", content=b'{"model": ', headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


def test_a_client_that_hangs_up_frees_its_rows(
    served: tuple[str, Engine], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine = served
    tasks: list[RowTask] = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda given: (tasks.extend(given), submit(given)))
    long = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4000, "temperature": 0}
    with httpx.stream("POST", f"{url}/completions", json={**long, "stream": True}) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/completions", json=long, timeout=0.5)
    client.completions.create(model="tiny", prompt="Hi", max_tokens=1)
    assert [len(task.row.ids) < 4000 for task in tasks] == [True, True, True]
    assert not engine._waiting


def test_a_full_queue_says_when_to_come_back(tiny: tuple[Any, Any]) -> None:
    with live_server(*tiny, max_waiting=2) as (url, engine):
        gate = threading.Event()
        held = engine.call(gate.wait)
        while engine._waiting:
            time.sleep(0.01)
        ask = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(httpx.post, f"{url}/completions", json=ask, timeout=60) for _ in range(2)]
            while len(engine._waiting) < 2:
                time.sleep(0.01)
            refused = httpx.post(f"{url}/completions", json=ask)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "queue_full"
            many = httpx.post(f"{url}/completions", json={**ask, "n": 3})
            assert many.status_code == 400 and "2 that may wait" in many.json()["error"]["message"]
            gate.set()
            assert [answer.result().status_code for answer in waiting] == [200, 200]
        held.result(10)


def test_an_engine_keeps_its_limits_and_outlives_errors(tiny: tuple[Any, Any]) -> None:
    engine = Engine(*tiny, max_rows=4, max_tokens=64)
    try:
        gate = threading.Event()
        engine.call(gate.wait)
        tasks = [RowTask(Row([1, 5, 6], Decoding(max_tokens=13, seed=i), frozenset())) for i in range(9)]
        engine.submit(tasks)
        failing = engine.call(lambda: 1 // 0)
        gate.set()
        assert all(len(task.done.result(60).ids) == 13 for task in tasks)
        assert engine.batches == 3  # 4 rows of 16 tokens fill 64
        with pytest.raises(ZeroDivisionError):
            failing.result(60)
        assert engine.call(lambda: 5).result(60) == 5
    finally:
        engine.close()
    with pytest.raises(Busy, match="shutting down"):
        engine.submit(tasks[:1])
    with pytest.raises(ValueError, match="max_rows = 0"):
        Engine(*tiny, max_rows=0)


def test_a_caller_that_gives_up_does_not_disturb_its_company(tiny: tuple[Any, Any]) -> None:
    engine = Engine(*tiny)
    try:
        tasks = [RowTask(Row([1, 5, 6], Decoding(max_tokens=9, seed=i), frozenset())) for i in range(3)]

        def give_up(row: Row) -> None:  # in the very step in which the row ends, as well as before
            if len(row.ids) >= 9:
                tasks[0].cancelled = True
                assert not tasks[0].done.cancel()

        tasks[0].on_token = give_up
        tasks[1].on_token = lambda row: setattr(tasks[1], "cancelled", len(row.ids) == 2)
        engine.submit(tasks)
        assert len(tasks[2].done.result(60).ids) == len(tasks[0].done.result(60).ids) == 9
        with pytest.raises(Busy, match="cancelled"):
            tasks[1].done.result(60)
        assert len(tasks[1].row.ids) == 2
    finally:
        engine.close()


def test_streams_are_server_sent_events(served: tuple[str, Engine]) -> None:
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "seed": 0, "stream": True}
    with httpx.stream("POST", f"{served[0]}/completions", json=ask) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    assert all(json.loads(line[6:])["object"] == "text_completion" for line in lines[:-1])
