"""Laws of keys and addresses: a key is nowhere, whatever repeats it; what cannot work is said before anything is sent,
and what an endpoint refuses in its own words."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tuna.gather.misbehaving import Fault, Misbehaving
from tests.tuna.gather.test_endpoint import ask_all
from tuna.gather.api.settings import EndpointSettings


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    caplog.set_level("DEBUG")
    echo = Fault(400, body=json.dumps({"error": {"message": f"bad key {secret}"}}))
    with Misbehaving(lambda count, request: echo if request["prompt"] == "question 1" else None) as server:
        outcome, _ = ask_all(server, tmp_path, 2)
        assert server.headers["authorization"] == f"Bearer {secret}"
    assert "[key]" in outcome.failed[1]
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(secret in text for text in [*files, *outcome.failed.values(), caplog.text])


SECRET = "sk-proj-Zq8wE4rT7yU2iO9pA5sD"
ECHOES = [
    SECRET, SECRET.upper(), SECRET[:14], SECRET[9:], f"{SECRET[:7]}****{SECRET[-4:]}", f"{SECRET[:3]}...{SECRET[-4:]}",
    base64.b64encode(SECRET.encode()).decode(), base64.b64encode(f"Bearer {SECRET}".encode()).decode(),
    base64.b64encode(f"user:{SECRET}".encode()).decode(), SECRET.encode().hex(), "x" * 290 + SECRET, repr(f"'{SECRET}"),
    f"{SECRET[:8]}********{SECRET[-4:]}", " ".join(SECRET), SECRET[:12] + "\n" + SECRET[12:], "\u200b".join(SECRET),
    "".join(f"\\u{ord(char):04x}" for char in SECRET), str(list(SECRET.encode())), SECRET.encode().hex(":"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ECHOES)))
def test_the_key_is_taken_out_in_every_form(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    echo = ECHOES[number]

    def answer(good: dict[str, Any]) -> dict[str, Any]:
        return {**good, "choices": [{"text": f"your key is {SECRET}"}]}

    def script(count: int, request: dict[str, Any]) -> Fault | None:
        body = json.dumps({"error": {"message": f"bad key: {echo}"}})
        return [Fault(answer=answer), Fault(400, body=body), Fault(answer=lambda good: echo)][
            int(request["prompt"][-1])
        ]

    with Misbehaving(script) as server:
        outcome, _ = ask_all(server, tmp_path, 3, concurrency=1, max_attempts=1)
    assert outcome.results == {0: "your key is [key]"}
    text = "".join([*outcome.failed.values(), *(path.read_text() for path in tmp_path.iterdir())]).lower()
    last = echo.lower()[-9:]
    assert last not in text
    assert SECRET.lower()[8:17] not in text and SECRET.lower()[-5:] not in text


def test_a_word_that_serves_as_key_may_stand_in_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "dummy")
    with Misbehaving(lambda count, request: Fault(answer=lambda good: {"choices": [{"text": "a dummy"}]})) as server:
        assert ask_all(server, tmp_path)[0].results == {0: "a dummy"}


@pytest.mark.parametrize(
    "key",
    ['"sk-abc"', "'sk-abc'", "sk-a\nb", "sk-a\rb", "Bearer sk-ab", "sk\u2011ab", "sk-a\tb", "sk-a\x00b"[:4] + "\x7f"],
)
def test_what_cannot_be_a_key_is_refused_before_anything_is_sent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match=r"\$MY_KEY (contains|is enclosed in)") as raised:
        EndpointSettings("http://localhost:1/v1", "MY_KEY")
    assert "sk" not in str(raised.value)
    with pytest.raises(ValueError, match="not the key"):
        EndpointSettings("http://localhost:1/v1", "sk-secret")


ADDRESSES = {
    " http://a:1/v1\n": "http://a:1/v1",
    "http://a/v1/": "http://a/v1",
    "https://a/v1/chat/completions": "https://a/v1",
    "https://a/v1/completions/": "https://a/v1",
    "http://[::1]:8000/v1": "http://[::1]:8000/v1",
    "HTTP://a/v1": "HTTP://a/v1",
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_addresses_as_they_are_copied(url: str) -> None:
    assert EndpointSettings(url).base_url == ADDRESSES[url]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8000/v1",
        "http://",
        "http://a b/v1",
        "http://a:port/v1",
        "http://[::1/v1",
        "http://a/\nv1",
        "http://a#b",
    ],
)
def test_no_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        EndpointSettings(url)


REMEDIES = [
    (404, '{"detail": "Not Found"}', "/v1", r"Not Found.*/elsewhere/completions.*--base-url .*/v1"),
    (404, '{"error": {"message": "The model `m` does not exist"}}', "", "does not exist.*--model"),
    (401, '{"error": "no"}', "", "OPENAI_API_KEY"),
    (400, '{"message": "maximum context length is 10 tokens"}', "", "maximum context.*--max-tokens"),
    (400, '{"error": {"message": "\'max_tokens\' is not supported, use \'max_completion_tokens\'"}}', "", "--extra"),
    (400, '{"detail": [{"msg": "temperature: unsupported value"}]}', "", """--extra '{"temperature": null}'"""),
    (
        422,
        '{"detail": [{"loc": ["body", "n"], "msg": "extra fields not permitted"}]}',
        "",
        """body.n: .*--extra '{"n": null}'""",
    ),
    (400, '{"error": "Unrecognized request argument supplied: logprobs"}', "", """--extra '{"logprobs": null}'"""),
    (400, "<html><h1>Bad  Gateway</h1></html>", "", "Bad Gateway"),
    (400, '{"error":' * 900 + "1" + "}" * 900, "", "status 400"),
]


@pytest.mark.parametrize(("status", "body", "path", "words"), REMEDIES)
def test_errors_are_in_the_endpoints_words_with_the_remedy(
    status: int, body: str, path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Misbehaving(lambda count, request: Fault(status, body=body)) as server:
        server.url = server.url.replace("/v1", "/elsewhere") if path else server.url
        outcome, _ = ask_all(server, tmp_path)
    assert re.search(words, str(outcome.stopped or outcome.failed[0]))


@pytest.mark.parametrize("url", ["http://user:secret@host/v1", "http://host/v1?key=secret", "localhost:80", "ftp://a"])
def test_addresses_with_credentials_or_none_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url") as raised:
        EndpointSettings(url)
    assert "secret" not in str(raised.value)
