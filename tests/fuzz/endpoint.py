"""Answers of a hostile HTTP server to `tuna generate`, `sample` and `judge`."""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from typer.testing import CliRunner, Result

from tests.tuna.gather.misbehaving import Fault, Misbehaving
from tuna.cli import app
from tuna.data.records import Record
from tuna.gather.responses import ResponseSet

SHORT_RUN = 6
KEY = "sk-proj-Zq8wE4rT7yU2iO9pA5sD"
COUNT = 4  # records
SPOT = '"@@@"'
Body = dict[str, Any]

# fmt: off
# What may stand in the place of any value of an answer, as it is sent.
ODD = [
    "null", "true", "0", "-1", "1.5", "-0.0", "1" + "0" * 400, "9" * 5000, "-1e308", "1e999", "NaN", "-Infinity",
    "-9999.0", "5.0", "[]", "{}", "[[]]", '""', '" "', r'"\ud83d"', r'"\udc00\ud800"', r'"\u0000"', r'"\u001b[31m"',
    '"1"', '"length"', '"content_filter"', r'"<think>hm"', r'"<think>a</think>b"', "[" * 3000 + "]" * 3000,
    '{"a":' * 300 + "1" + "}" * 300, '"' + "x" * 100_000 + '"', f'"{KEY}"', '[{"type":"text","text":"part"}]',
    '[{"type":"image"}]', '{"content":[]}', '{"content":[{"token":"a","logprob":-1}]}',
    '{"token_logprobs":[null,-1],"tokens":["a"]}', '"\u202e"', "10000001", "1e5",
]
STATUSES = [
    100, 204, 206, 300, 301, 303, 304, 307, 308, 400, 403, 404, 405, 408, 409, 413, 415, 418, 422, 429, 451, 500,
    501, 503, 529, 599,
]
WAITS = ["1e9", "-5", "nan", "inf", "soon", "0", "0.01", "9" * 400, "Thu, 01 Jan 9999 00:00:00 GMT", "\x00", "\u0967"]
WORDS = [
    "{", "}", "[", "]", "{{", '{"ranking": ', "[[2], [1]]", "[[1], [2]]", "Ranking: ", "Final ranking: ", "2 > 1",
    "1 > 2", "\n", "<think>", "</think>", "> ", "```\n", "Candidate 2 says:\n", "worst to best", "1. ", "Candidate 1",
    ": rank 2", " = ", '"', "'", r"\ud83d", '"scores": [', '"reference": "', ", ", "9" * 5000, "\u017fix", "\uff11",
    "1st: ", "all tied", "\x00", "I'm sorry", '{"order": ', '{"candidate": 2, "rank": ', "}}", "|", "(", ")", "NaN",
    "null", "-1", "1e999",
]
# fmt: on


def case(seed: int) -> None:
    draw = random.Random(seed)
    command = draw.choice(["chat", "completions", "bare", "sample", "judge"])
    bad = set(draw.sample(range(COUNT), draw.randint(1, COUNT - 1)))

    def script(count: int, body: Body) -> Fault | None:
        number = next((i for i in range(COUNT) if f"Question {i}?" in json.dumps(body)), None)
        mood = random.Random(f"{seed} {count} {json.dumps(body)}")  # whatever the order in which requests come
        if number not in bad or mood.random() < 0.1:
            return None
        return _fault(mood, command, body)

    with (
        tempfile.TemporaryDirectory() as place,
        mock.patch.dict(os.environ, {"OPENAI_API_KEY": KEY, "COLUMNS": "200"}),
        Misbehaving(script, judge=_verdict if command == "judge" else None) as server,
    ):
        folder = Path(place)
        run = _command(folder, server, command)
        first = run()
        assert first.exit_code in (0, 1, 3), _told(seed, "exit code", first)
        done, failed = _results(folder, command)
        summary = json.loads((folder / "run" / "summary.json").read_text("utf-8"))
        assert summary["done"] == len(done) and summary["set aside"] == len(failed), _told(seed, "summary", first)
        if first.exit_code != 3:
            assert len(done) + len(failed) == COUNT and not done & failed, _told(seed, "records", first)
            assert set(range(COUNT)) - bad <= done, _told(seed, "a record that was answered well", first)
        assert summary["calls of all runs"] >= sum(server.paid.values()), _told(seed, "calls in the books", first)
        server.script = lambda count, body: None
        asked = len(server.bodies)
        # More tries for a judge whose answers are there, but cannot be read.
        second = run("--tries", "5") if command == "judge" else run()
        assert second.exit_code == 0, _told(seed, "rerun", second)
        again = {i for i in done if any(f"Question {i}?" in json.dumps(body) for body in server.bodies[asked:])}
        assert not again, _told(seed, f"paid again for {again}", second)
        assert _results(folder, command) == (set(range(COUNT)), set()), _told(seed, "records of the rerun", second)
        asked = len(server.bodies)
        third = run("--tries", "5") if command == "judge" else run()
        assert third.exit_code == 0 and len(server.bodies) == asked, _told(seed, "a third run pays", third)
        _no_key(seed, folder, [first, second, third])


def _command(folder: Path, server: Misbehaving, command: str) -> Callable[..., Result]:
    lines = [{"id": str(i), "prompt": f"Question {i}?"} for i in range(COUNT)]
    if command == "judge":
        lines = [{**line, "responses": ["good", "bad"]} for line in lines]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    name = {"chat": "generate", "completions": "generate", "bare": "generate"}.get(command, command)
    arguments = [name, "--data" if name == "judge" else "--instructions", str(data), "--model", "T", "--output"]
    arguments += [str(folder / "run"), "--base-url", server.url, "--backoff", "0.005", "--max-backoff", "0.01"]
    arguments += ["--max-attempts", "2", "--request-timeout", "5", "--concurrency", "2"]
    arguments += {
        "chat": ["--n", "2"],
        "completions": ["--api", "completions", "--n", "2"],
        "bare": ["--no-logprobs", "--n", "2"],
        "sample": ["--k", "2", "--tries", "1"],
        "judge": ["--tries", "2"],
    }[command]
    return lambda *more: CliRunner().invoke(app, [*arguments, *more])


def _verdict(body: Body) -> str:
    return '{"kind": "open", "reference": "r", "duplicates": [], "scores": [], "ranking": [[1], [2]]}'


def _results(folder: Path, command: str) -> tuple[set[int], set[int]]:
    """The records that are done and those set aside, each a valid one."""
    rows = _rows(folder / "run" / ("records.jsonl" if command == "judge" else "responses.jsonl"))
    for row in rows:
        if command == "judge":
            Record.model_validate(row)
            continue
        found = ResponseSet.model_validate(row)
        assert len(found.responses) == 2, row
        for response in found.responses:
            if command in ("chat", "completions"):
                assert response.logprob_sum is not None and response.tokens is not None, row
                assert response.tokens or not response.text.strip(), row
    failed = _rows(folder / "run" / "failed.jsonl")
    assert all(isinstance(row["reason"], str) and row["reason"] for row in failed)
    return {int(row["id"]) for row in rows}, {int(row["id"]) for row in failed}


def _rows(path: Path) -> list[Body]:
    if not path.exists():
        return []

    def constant(name: str) -> None:
        raise AssertionError(f"{name} in {path.name}")

    return [
        json.loads(line, parse_constant=constant) for line in path.read_bytes().decode("utf-8").splitlines() if line
    ]


def _no_key(seed: int, folder: Path, results: list[Result]) -> None:
    texts = [path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()]
    texts += [re.sub(r"[\s│─]", "", result.output) for result in results]
    forms = (KEY, KEY[8:], base64.b64encode(KEY.encode()).decode()[:24], base64.b64encode(KEY.encode()).decode()[4:28])
    assert not any(form in text for form in forms for text in texts), f"seed {seed}: the key was written"


def _told(seed: int, law: str, result: Result) -> str:
    return f"seed {seed}: {law}: exit {result.exit_code}, {result.exception!r}\n{result.output[-1500:]}"


def _fault(draw: random.Random, command: str, body: Body) -> Fault:
    if command == "judge" and draw.random() < 0.5:
        words = "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))
        return _answer(draw, json.dumps(_good(command, body, words)))
    kind = draw.random()
    if kind < 0.55:
        return _answer(draw, _mutated(draw, _good(command, body)))
    if kind < 0.75:
        return Fault(raw=_framed(draw, json.dumps(_good(command, body)).encode()))
    return _refusal(draw)


def _good(command: str, body: Body, text: str | None = None) -> Body:
    choices = []
    for index in range(body.get("n") or 1):
        words = text or ("fine" if command != "judge" else _verdict(body))
        values = [{"token": "fi", "logprob": -0.5, "bytes": None}, {"token": "ne", "logprob": -0.25, "bytes": None}]
        choice: Body = {"index": index, "finish_reason": "stop"}
        if command == "completions":
            choice |= {"text": words, "logprobs": {"tokens": ["fi", "ne"], "token_logprobs": [-0.5, -0.25]}}
        else:
            message = {"role": "assistant", "content": words, "refusal": None, "reasoning_content": None}
            choice |= {"message": message, "logprobs": {"content": values} if command == "chat" else None}
        choices.append(choice)
    usage = {"prompt_tokens": 5, "completion_tokens": 4, "completion_tokens_details": {"reasoning_tokens": 0}}
    return {"id": "x", "model": "T", "choices": choices, "usage": usage}


def _mutated(draw: random.Random, reply: Body) -> str:
    """The answer with one to three of its values, fields or characters changed."""
    text = json.dumps(reply)
    for _ in range(draw.randint(1, 3)):
        way = draw.random()
        value = draw.choice(ODD)
        if way < 0.7:
            # Any value: what follows a colon, a bracket or a comma, up to its end where it is a plain one.
            spots = list(re.finditer(r'(?<=[:\[,] )(?:"[^"]*"|-?[\d.]+|null)(?!:)|(?<=\[)\{', text[:5000]))
            spot = draw.choice(spots) if spots else None
            if spot is not None and spot[0] != "{":
                text = text[: spot.start()] + value + text[spot.end() :]
            elif spot is not None:
                text = text[: spot.start()] + value + ", " + text[spot.start() :]
        elif way < 0.8:
            name = draw.choice(["choices", "usage", "logprobs", "message", "text", "content", "model", "finish_reason"])
            text = text.replace(f'"{name}": ', f'"{name}": {value}, "{name}_": ', 1)
        elif way < 0.9:
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(["", "\x00", '"', "}", "]", ",", "\\", "\ufffd"]) + text[at + 1 :]
        else:
            text = text.replace('"choices": [', '"choices": [' + value + ", ", 1)
    return text


def _answer(draw: random.Random, text: str) -> Fault:
    content = text.encode("utf-8", "replace")
    return Fault(
        raw=_http(200, content, {"content-type": draw.choice(["application/json", "text/html", "x; charset=hex"])})
    )


def _http(status: int, content: bytes, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "replace") + content


def _framed(draw: random.Random, good: bytes) -> bytes:
    """A good answer in a bad frame."""
    packed = gzip.compress(good, mtime=0)
    bomb = gzip.compress(b'{"choices":"' + b" " * (24 << 20) + b'"}', 1)
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    return draw.choice(
        [
            _http(200, good[: draw.randrange(len(good))]),
            _http(200, good).replace(b"content-length: ", b"content-length: 1"),
            _http(200, good).replace(b"content-length: ", b"content-length: -"),
            _http(200, good, {"content-encoding": "gzip"}),
            _http(200, packed, {"content-encoding": "gzip"}),
            _http(200, packed[:-9], {"content-encoding": "gzip"}),
            _http(200, packed, {"content-encoding": draw.choice(["br", "zstd", "deflate", "gzip, gzip", "\x00"])}),
            _http(200, bomb, {"content-encoding": "gzip"}),
            _http(200, good.decode().encode(draw.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-le"]))),
            _http(200, good.replace(b"T", b"\xff")),
            _http(200, b"data: " + good + b"\n\ndata: [DONE]\n\n", {"content-type": "text/event-stream"}),
            _http(200, b"<html><title>Busy</title></html>"),
            _http(200, b""),
            _http(200, good, {"set-cookie": "a=\x01\x02; path=/", "x" * 300: "y" * 3000}),
            chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(good), good),
            chunked + b"zz\r\n" + good,
            chunked + b"ffffffffffffffff\r\n" + good,
            b"HTTP/1.1 200 OK\r\n\r\n" + good,
            b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 9000 + b"\r\n" + good,
            b"HTTP/9.9 abc\r\n\r\n" + good,
            b"\x00" * 50,
            b"",
        ]
    )


def _refusal(draw: random.Random) -> Fault:
    status = draw.choice(STATUSES)
    echo = draw.choice(
        [KEY, KEY[:20], base64.b64encode(b"Bearer " + KEY.encode()).decode(), f"{KEY[:5]}****{KEY[-4:]}", "no"]
    )
    body = draw.choice(
        [
            json.dumps({"error": {"message": f"bad {echo}", "code": draw.choice(["x", 5, None, "context_length"])}}),
            json.dumps({"detail": [{"msg": f"bad {echo}", "loc": []}]}),
            json.dumps({"error": echo}),
            '{"error":' * 900 + "1" + "}" * 900,
            f"<html>{echo}" + "<" * 3000,
            "\x1b[31m" + echo,
            "",
            "x" * 200_000,
            "n > 1 is not supported",
        ]
    )
    headers = {"retry-after": draw.choice(WAITS)} if draw.random() < 0.5 else {}
    if 300 <= status < 400:
        here = [
            "/v1/chat/completions",
            "http://other.invalid/v1",
            f"http://{KEY}@127.0.0.1/",
            "//[::",
            "",
            "file:///etc",
        ]
        headers["location"] = draw.choice(here)
    return Fault(raw=_http(status, body.encode(), headers))
