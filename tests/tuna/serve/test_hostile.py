"""Laws of `tuna serve` against clients that mean harm or know no better: other hosts and pages are refused, a request
has bounds, what is wrong with it is the client's error in OpenAI's shape, and no client keeps others, or the end,
waiting."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.tuna.serve.live_server import live_server
from tuna.models.loading import tiny_model
from tuna.serve import bodies, connections, create_app
from tuna.serve.access import host_name
from tuna.serve.bodies import parse, to_json
from tuna.serve.engine import Engine
from tuna.serve.protocol import CompletionRequest
from tuna.serve.rank import parts_of
from tuna_kernels import Group
from tuna_kernels.integrations.transformers import prepare_model

JSON = {"content-type": "application/json"}
ASK: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 1}
TURNS = [{"role": "user", "content": "a"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": TURNS}


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model, tokenizer = tiny_model(seed=3)
    return prepare_model(model.eval()), tokenizer


@pytest.fixture(scope="module")
def url(tiny: tuple[Any, Any]) -> Iterator[str]:
    with live_server(*tiny) as (found, _):
        yield found


def post(url: str, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    return httpx.post(f"{url}/{path}", content=content, headers={**JSON, **headers}, timeout=60)


def message(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.:80", "127.0.0.1", "127.9.9.9:1", "[::1]:80", "[::ffff:7f00:1]"]
)
def test_this_machine_may_ask(url: str, host: str) -> None:
    assert httpx.get(f"{url}/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", "10.1.2.3"],
)
@pytest.mark.parametrize("path", ["health", "v1/models", "nowhere"])
def test_other_hosts_are_refused(url: str, host: str, path: str) -> None:
    answer = httpx.get(f"{url.removesuffix('v1')}{path}", headers={"host": host})
    assert answer.status_code == 403 and "--allow-host" in message(answer)


@pytest.mark.parametrize(
    "host", ["", "a b", "evil@localhost", "localhost:80:80", "localhost, evil", "[::1", "localhost:x"]
)
def test_a_host_must_be_one(url: str, host: str) -> None:
    assert httpx.get(f"{url}/models", headers={"host": host}).status_code == 400


def test_several_hosts_and_none_are_refused(url: str) -> None:
    for hosts in ("", "Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as client:
            client.sendall(f"GET /v1/models HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "origin", ["null", "", "file://", "http://evil.example", "https://localhost.evil.example", "http://a@localhost",
               "chrome-extension://abc", "http://[::1", "http://localhost http://evil.example"],
)  # fmt: skip
def test_pages_of_others_are_refused(url: str, origin: str) -> None:
    answer = post(url, "completions", ASK, origin=origin)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pages_of_this_machine_may_ask(url: str) -> None:
    assert post(url, "completions", ASK, origin="http://localhost:3000").status_code == 200


@contextmanager
def app_server(tiny: tuple[Any, Any], **settings: Any) -> Iterator[str]:
    with live_server(*tiny, app=settings) as (url, _):
        yield url


def test_a_key_and_a_name_are_asked_for_where_given(tiny: tuple[Any, Any]) -> None:
    with app_server(tiny, hosts=["Box.example."], api_key="s3cret") as url:
        right = {"authorization": "Bearer s3cret"}
        assert post(url, "completions", ASK, **right).status_code == 200
        assert post(url, "completions", ASK, **right, host="box.example:81", origin="https://box.example").is_success
        assert post(url, "completions", ASK, **right, host="other.example").status_code == 403
        for wrong in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "Basic s3cret"}, {"authorization": "ü"}):
            answer = post(url, "completions", ASK, **{k: v.encode("latin-1") for k, v in wrong.items()})  # type: ignore[arg-type]
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key" and "s3cret" not in answer.text
        assert httpx.get(f"{url}/models").status_code == 401
        assert httpx.get(f"{url.removesuffix('v1')}health").status_code == 200


def test_hosts_keys_and_bounds_are_checked_at_the_start(tiny: tuple[Any, Any]) -> None:
    engine = Engine(*tiny)
    try:
        for settings, words in (
            ({"hosts": ["http://a.example"]}, "is not a name"),
            ({"api_key": ""}, "not empty"),
            ({"api_key": "a\nb"}, "without spaces"),
            ({"api_key": "schlüssel"}, "ASCII"),
            ({"max_body": 0}, "max_body = 0"),
        ):
            with pytest.raises(ValueError, match=words):
                create_app(engine, "tiny", **settings)  # type: ignore[arg-type]
    finally:
        engine.close()
    assert host_name("[0:0::1]:5") == "::1"


HALF = "\\ud800"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", '{"model":"tiny","prompt":"a%s"}'),
        ("completions", '{"model":"tiny","prompt":["a","%s"]}'),
        ("completions", '{"model":"%s","prompt":"a"}'),
        ("completions", '{"model":"tiny","prompt":"a","stop":["%s"]}'),
        ("completions", '{"model":"tiny","prompt":"a","user":"%s"}'),
        ("completions", '{"model":"tiny","prompt":"a","%s":1}'),
        ("chat/completions", '{"model":"tiny","messages":[{"role":"user","content":"%s"}]}'),
        ("chat/completions", '{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"%s"}]}]}'),
        ("chat/completions", '{"model":"tiny","messages":[{"role":"user","content":"a","id":"%s"}]}'),
        ("chat/completions", '{"model":"tiny","messages":[],"tools":[{"function":{"name":"%s"}}]}'),
        ("chat/completions", '{"model":"tiny","messages":[{"role":"user","content":"a"}],"response_format":{"type":'
                             '"json_schema","json_schema":{"schema":{"properties":{"%s":{}}}}}}'),
        ("rank", '{"prompt":"a","responses":["b","%s"]}'),
        ("rank", '{"prompt":"a","responses":["b"],"template":"%s{prompt}"}'),
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_is_the_clients_error(url: str, path: str, body: str) -> None:
    answer = post(url, path, body % HALF)
    assert answer.status_code == 400 and "surrogate" in message(answer)
    whole = post(url, path, body % "\\ud83e\\udd8a")
    assert whole.status_code in (200, 400, 404) and "surrogate" not in whole.text


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("completions", b"", "not valid JSON"),
        ("completions", b"\xff", "not valid JSON"),
        ("completions", "[]", "JSON object"),
        ("completions", '{"model":"tiny","prompt":%s}' % ("[" * 300 + "]" * 300), "nested more than 64"),
        ("completions", "[" * 40_000, "nested more than 64"),
        ("completions", '{"prompt":%s}' % ("[" + "[]," * 60_000 + "[]]"), "lists and objects"),
        ("completions", '{"model":"tiny","prompt":"a","temperature":NaN}', "NaN is not a JSON number"),
        ("completions", '{"model":"tiny","prompt":"a","temperature":1e999}', "beyond the range of float64"),
        ("completions", '{"model":"tiny","prompt":"a","seed":%s}' % ("9" * 5000), "not valid JSON"),
        ("completions", '{"model":"tiny","prompt":"a","max_tokens":%s}' % ("9" * 400), "max_tokens"),
        ("completions", '{"model":"tiny","prompt":[%s]}' % ("9" * 400), "the vocabulary has"),
        ("completions", '{"model":"tiny","prompt":[true]}', "must be a text"),
        ("completions", '{"model":"tiny","prompt":{"a":1}}', "must be a text"),
        ("completions", {**ASK, "stop": ["x" * 2000]}, "at most 1024"),
        ("completions", {**ASK, "prompt": "x" * 2_000_000}, "4096 positions"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
         "a part that is not text"),
        ("chat/completions", {**CHAT, "messages": [{**TURNS[0], "tool_calls": [{"id": "call"}]}]}, "tool_calls"),
        ("rank", {"prompt": "a", "responses": ["b"], "length_penalty": 1e308}, "length_penalty"),
        ("rank", {"prompt": "a", "responses": ["x" * 2_000_000]}, "4096 positions"),
        ("rank", {"prompt": "a b c", "responses": ["x"], "max_length": 2}, "leaves no room"),
    ],
)  # fmt: skip
def test_what_no_request_may_hold_is_the_clients_error(url: str, path: str, body: Any, words: str) -> None:
    answer = post(url, path, body)
    assert answer.status_code == 400 and words in message(answer)
    assert len(answer.content) < 2000


def test_fields_without_a_value_may_stand_beside_a_turn(url: str) -> None:
    turns = [{**TURNS[0], "tool_calls": None, "refusal": None}]
    assert post(url, "chat/completions", {"model": "tiny", "messages": turns, "max_tokens": 1}).status_code == 200


def test_brackets_in_a_text_are_no_lists() -> None:
    text = '[{\\"' * 30_000
    assert parse(f'{{"model":"tiny","prompt":"{text}"}}'.encode(), CompletionRequest).prompt == ['[{"' * 30_000]


def test_an_answer_is_written_as_json_writes_it() -> None:
    answer = {"a": 1, "choices": [{"é": "\u2028"}, None], "empty": [], "usage": {"n": [1, 2]}}
    assert json.loads(to_json(answer)) == answer
    with pytest.raises(ValueError, match="JSON"):
        to_json({"a": float("nan")})


def test_a_body_is_bounded_whatever_its_headers_say(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "DRAIN_SECONDS", 3)
    with app_server(tiny, max_body=1000) as url:
        large = json.dumps({**ASK, "prompt": "x" * 5000}).encode()
        for content in (large, iter([large[:500], large[500:]])):
            answer = httpx.post(f"{url}/completions", content=content, headers=JSON)
            assert answer.status_code == 413 and "1,000 bytes" in message(answer)
        assert httpx.post(f"{url}/completions", content=iter([json.dumps(ASK).encode()]), headers=JSON).is_success
        assert post(url, "completions", ASK, **{"content-type": "text/plain"}).status_code == 415

        def endless() -> Iterator[bytes]:
            while True:
                yield b"x" * 1000

        with suppress(httpx.TransportError):  # answered or cut off, but not read on and on
            assert httpx.post(f"{url}/completions", content=endless(), headers=JSON).status_code == 413


def test_a_body_that_does_not_arrive_is_given_up(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuna.serve.bodies.BODY_SECONDS", 0.3)
    with app_server(tiny, max_body=1000) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port), timeout=30) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            answer = b"".join(iter(lambda: client.recv(65536), b""))  # to its end: the connection is closed
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within" in answer


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {**ASK, "prompt": ["a"] * 5, "n": 2}),
        ("completions", {**ASK, "prompt": ["a"] * 9}),
        ("completions", {**ASK, "prompt": [[5]] * 9, "max_tokens": 0, "echo": True}),
        ("completions", {**ASK, "n": 9, "best_of": 9}),
        ("chat/completions", {"model": "tiny", "messages": TURNS, "n": 9}),
        ("rank", {"prompt": "a", "responses": ["b"] * 9}),
    ],
)  # fmt: skip
def test_rows_are_counted_before_they_are_made(tiny: tuple[Any, Any], path: str, body: dict[str, Any]) -> None:
    with live_server(*tiny, max_waiting=8) as (url, engine):
        answer = post(url, path, body)
        assert answer.status_code == 400 and "more than the 8 that may wait" in message(answer)
        assert engine.batches == 0


def test_responses_are_scored_a_few_at_a_time_with_the_same_scores(tiny: tuple[Any, Any]) -> None:
    group = Group([1, 5], [[6, 7, 8], [6], [6, 9], [7]], ranks=[0] * 4)
    assert [[list(r) for r in part.responses] for part in parts_of(group, 5)] == [[[6, 7, 8]], [[6], [6, 9]], [[7]]]
    assert len(list(parts_of(group, 1))) == 4
    body = {"prompt": "Name a prime", "responses": ["7", "a number such as 9", "13", "7", ""], "logprobs": True}
    found = []
    for max_tokens in (8, 4096):
        with live_server(*tiny, max_tokens=max_tokens) as (url, _):
            found.append(post(url, "rank", body).json())
    assert found[0]["usage"]["computed_tokens"] > found[1]["usage"]["computed_tokens"]
    for few, all_ in zip(found[0]["results"], found[1]["results"], strict=True):
        assert few["score"] == pytest.approx(all_["score"], rel=1e-5) and few["token_ids"] == all_["token_ids"]


def test_a_large_request_keeps_nobody_waiting(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a worker is at a request, the server answers others; which thread it is on shows without a clock."""
    seen: list[str] = []
    gate = threading.Event()

    def slow(body: bytes, model: Any) -> Any:
        seen.append(threading.current_thread().name)
        assert gate.wait(60)
        return parse(body, model)

    with live_server(*tiny) as (url, _):
        monkeypatch.setattr("tuna.serve.app.parse", slow)
        thread = threading.Thread(target=post, args=(url, "completions", ASK))
        thread.start()
        while not seen:
            time.sleep(0.01)
        assert httpx.get(f"{url.removesuffix('v1')}health", timeout=30).status_code == 200
        gate.set()
        thread.join(60)
    assert seen[0].startswith("tuna-worker")


def test_texts_are_tokenised_and_rendered_on_workers(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tuna.serve import app

    names: list[str] = []
    for function in ("encode_prompts", "tokenize_records", "json_constraint", "to_json", "completion_logprobs"):
        original = getattr(app, function)

        def spy(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            names.append(threading.current_thread().name)
            return original(*args, **kwargs)

        monkeypatch.setattr(app, function, spy)
    with live_server(*tiny) as (url, _):
        assert post(url, "completions", {**ASK, "logprobs": 1}).is_success
        form = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "maxLength": 1}}}
        chat = {"model": "tiny", "messages": TURNS, "max_tokens": 9, "response_format": form}
        assert post(url, "chat/completions", chat).is_success
        assert post(url, "rank", {"prompt": "a", "responses": ["b"]}).is_success
    assert len(names) == 8 and all(name.startswith("tuna-worker") for name in names)


# The whole process


@contextmanager
def process(*more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [
        sys.executable,
        "-m",
        "tuna",
        "serve",
        "--model",
        "tiny",
        "--port",
        "0",
        "--quiet",
        "--threads",
        "1",
        *more,
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert running.stdout is not None
        port = int(running.stdout.readline().rsplit(":", 1)[1].split("/")[0])
        deadline = time.monotonic() + 60
        while True:
            try:
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                client.request("GET", "/health")
                assert client.getresponse().status == 200
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield running, port
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_server_whatever_clients_do(number: signal.Signals, code: int) -> None:
    """Half a head, half a body, an idle connection, a long answer, and a stream that nobody reads."""

    def head(size: int) -> str:
        fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": size}
        return "\r\n".join(["POST /v1/completions HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items()), "", ""])

    long = json.dumps({**ASK, "max_tokens": 4000, "n": 16})
    stream = json.dumps({**ASK, "max_tokens": 4000, "n": 16, "stream": True, "logprobs": 5})
    with process() as (running, port):
        clients = []
        for sent in (
            "POST /v1",
            head(100) + "{",
            "",
            head(len(long)) + long,
            head(len(stream)) + stream,
        ):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", port))
            client.sendall(sent.encode())
            clients.append(client)
        clients[-1].recv(10)  # the stream runs
        running.send_signal(number)
        assert running.wait(30) == code
        assert running.stderr is not None and "Traceback" not in running.stderr.read()
        clients[3].settimeout(10)
        assert b" 503 " in clients[3].recv(1000)
        for client in clients:
            client.close()


def test_connections_that_ask_nothing_are_let_go(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.6)
    with app_server(tiny) as address:
        place = ("127.0.0.1", urlsplit(address).port)
        silent, slow = socket.create_connection(place), socket.create_connection(place)
        start = time.monotonic()
        for letter in b"GET /health HTTP/1.1\r\nX: " + b"a" * 200:
            try:
                slow.sendall(bytes([letter]))
            except OSError:
                break
            time.sleep(0.02)
        assert 0.4 < time.monotonic() - start < 3
        silent.settimeout(5)
        with suppress(ConnectionResetError):
            assert silent.recv(1) == b""
        with httpx.Client() as client:  # and one that asks again and again is not
            for _ in range(4):
                assert client.get(address.replace("/v1", "/health")).status_code == 200
                time.sleep(0.3)


def test_a_new_connection_takes_the_place_of_an_idle_one(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 5)
    with app_server(tiny) as address, ExitStack() as stack:
        place = ("127.0.0.1", urlsplit(address).port)
        idle = [stack.enter_context(socket.create_connection(place)) for _ in range(12)]
        assert httpx.get(address.replace("/v1", "/health"), timeout=5).status_code == 200
        idle[0].settimeout(5)
        with suppress(ConnectionResetError):
            assert idle[0].recv(1) == b""
