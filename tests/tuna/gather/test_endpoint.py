"""Laws of the layer of paid calls: every fault of a real server is survived or reported, nothing is paid twice,
bounds hold, the key is nowhere."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import gzip
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.tuna.gather.misbehaving import Fault, Misbehaving
from tuna.gather.api.budget import Budget, BudgetSpent, Prices
from tuna.gather.api.calls import PaidCalls, Unfinished, run_jobs
from tuna.gather.api.endpoint import (
    CallFailed,
    Endpoint,
    EndpointRefused,
    UnusableAnswer,
    retry_after,
)
from tuna.gather.api.journal import Journal
from tuna.gather.api.settings import EndpointSettings

PATIENT = {"backoff": 0.01, "max_backoff": 0.05, "max_attempts": 6, "request_timeout": 20.0}


def text_of(reply: Any) -> str:
    if not isinstance(reply, dict) or not reply.get("choices"):
        raise UnusableAnswer("there are no choices")
    return str(reply["choices"][0]["text"])


def body(number: int = 0) -> dict[str, Any]:
    return {"model": "m", "prompt": f"question {number}", "max_tokens": 5}


def ask_all(
    server: Misbehaving, folder: Path, count: int = 1, concurrency: int = 4, *, bounds: Any = None, **settings: Any
) -> tuple[Any, PaidCalls]:
    """Ask `count` questions; the outcome and the calls object."""

    async def go() -> tuple[Any, PaidCalls]:
        with Journal(folder, "test", {"model": "m"}) as journal:
            budget = Budget(**(bounds or {}), calls=journal.calls, spent=journal.spent)
            async with Endpoint(EndpointSettings(server.url, **{**PATIENT, **settings})) as endpoint:
                calls = PaidCalls(endpoint, journal, budget)
                outcome = await run_jobs(
                    range(count), lambda i: calls.ask("completions", body(i), text_of), concurrency=concurrency
                )
                return outcome, calls

    return asyncio.run(go())


FAULTS = {
    "429": Fault(429, {"retry-after": "0.05"}),
    "429 in milliseconds": Fault(429, {"retry-after-ms": "20"}),
    "500": Fault(500),
    "503": Fault(503, {"retry-after": "0"}),
    "slow": Fault(delay=1.5),
    "cut before the answer": Fault(raw=b""),
    "cut within the head": Fault(raw=b"HTTP/1.1 200 OK\r\ncontent-le"),
    "cut within the body": Fault(raw=b'HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{"choices": ['),
    "no HTTP": Fault(raw=b"garbage\r\n\r\n"),
    "malformed JSON": Fault(answer=lambda good: json.dumps(good)[:-9]),
    "no JSON": Fault(answer=lambda good: "<html>Bad gateway</html>"),
    "a list": Fault(answer=lambda good: [good]),
    "empty choices": Fault(answer=lambda good: {**good, "choices": []}),
    "null choices": Fault(answer=lambda good: {**good, "choices": None}),
    "empty body": Fault(answer=lambda good: ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_waited_out(name: str, tmp_path: Path) -> None:
    with Misbehaving(lambda count, request: FAULTS[name] if count < 2 else None) as server:
        timeout = 0.5 if name == "slow" else 20.0
        outcome, calls = ask_all(server, tmp_path, request_timeout=timeout)
    assert list(outcome.results) == [0] and not outcome.failed
    assert server.calls == 3 and sum(server.paid.values()) == 1
    billed = name not in ("429", "429 in milliseconds", "500", "503")
    assert calls.journal.lost == (2 if billed else 0)
    assert calls.budget.calls == calls.journal.calls == 1 + calls.journal.lost


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_without_end_sets_the_job_aside_and_the_others_are_done(name: str, tmp_path: Path) -> None:
    def script(count: int, request: dict[str, Any]) -> Fault | None:
        return FAULTS[name] if request["prompt"] == "question 1" else None

    with Misbehaving(script) as server:
        timeout = 0.3 if name == "slow" else 20.0
        outcome, _ = ask_all(server, tmp_path, 3, request_timeout=timeout, max_attempts=2)
    assert sorted(outcome.results) == [0, 2] and list(outcome.failed) == [1]
    assert "given up after 2 attempts" in outcome.failed[1]


def test_retry_after_is_obeyed_by_all(tmp_path: Path) -> None:
    """Once a 429 has come back, no request leaves before the time it names, whoever wants to send it.

    The stub takes 0.05 s; a second is left for the client to notice. Unheld, the others would send all the while.
    """
    refused: list[int] = []

    def script(count: int, request: dict[str, Any]) -> Fault | None:
        if not refused and request["prompt"] == "question 1":
            refused.append(len(server.times) - 1)
            return Fault(429, {"retry-after": "2"})
        return None

    with Misbehaving(script, delay=0.05) as server:
        outcome, _ = ask_all(server, tmp_path, 120, concurrency=3)
        at = server.times[refused[0]]
        assert [later - at for later in server.times if at + 1 < later < at + 1.99] == []
        assert max(server.times) >= at + 1.99
    assert len(outcome.results) == 120


def test_retry_after_reads_dates() -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 97 < (retry_after({"retry-after": date}) or 0) < 101
    assert retry_after({"retry-after": email.utils.formatdate(time.time() - 100, usegmt=True)}) == 0
    for text in ("soon", "nan", "inf", "", "1e9", "9" * 400, "Thu, 01 Jan 9999 00:00:00 GMT"):
        assert retry_after({"retry-after": text}) is None


def test_a_wait_beyond_the_total_timeout_is_not_begun(tmp_path: Path) -> None:
    with Misbehaving(lambda count, request: Fault(429, {"retry-after": "3600"})) as server:
        outcome, _ = ask_all(server, tmp_path, 2, concurrency=1, total_timeout=30)
        assert server.calls == 1
    assert not outcome.failed and "total_timeout = 30 s" in str(outcome.stopped)


def test_an_endpoint_that_is_down_ends_the_run_early(tmp_path: Path) -> None:
    """25 jobs in a row without an answer; jobs refused for their own sake (400) do not count."""
    with Misbehaving(lambda count, request: Fault(502)) as server:
        outcome, _ = ask_all(server, tmp_path, 200, concurrency=2, max_attempts=1)
        assert 25 <= server.calls <= 27 and "25 jobs in a row" in str(outcome.stopped)
    with Misbehaving(lambda count, request: Fault(400)) as server:
        outcome, _ = ask_all(server, tmp_path, 60, concurrency=2, max_attempts=1)
        assert server.calls == 60 and outcome.stopped is None and len(outcome.failed) == 60


def test_a_disk_that_fills_up_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that stops half way is the end of the run; the next one finds all lines whole and goes on."""
    real, room = os.write, 700

    def write(file: int, content: memoryview) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room, taken = max(0, room - len(content)), min(room, len(content))
        return real(file, content[:taken])

    with Misbehaving() as server:
        with monkeypatch.context() as patch:
            patch.setattr("tuna.gather.api.journal.os.write", write)
            with pytest.raises(OSError, match="No space"):
                ask_all(server, tmp_path, 9, concurrency=4)
        assert not (tmp_path / "journal.jsonl").read_bytes().endswith(b"\n")
        outcome, calls = ask_all(server, tmp_path, 9, concurrency=4)
        assert len(outcome.results) == 9 and calls.found > 0


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_stops_the_run(status: int, tmp_path: Path) -> None:
    with Misbehaving(lambda count, request: Fault(status)) as server:
        outcome, _ = ask_all(server, tmp_path, 50, concurrency=2)
        assert server.calls <= 2
    assert isinstance(outcome.stopped, EndpointRefused) and not outcome.results


def test_a_bad_request_costs_one_job_and_one_attempt(tmp_path: Path) -> None:
    bad = Fault(400, body='{"error": {"message": "too long a prompt", "code": "context_length"}}')
    with Misbehaving(lambda count, request: bad if "question 0" in request["prompt"] else None) as server:
        outcome, _ = ask_all(server, tmp_path, 2)
        assert server.calls == 2
    assert "too long a prompt" in outcome.failed[0] and 1 in outcome.results


def test_nobody_there_is_a_failed_connection_and_free(tmp_path: Path) -> None:
    with Misbehaving() as server:
        pass
    outcome, calls = ask_all(server, tmp_path, max_attempts=2)
    assert "connection failed" in outcome.failed[0] and calls.budget.calls == 0


def test_a_second_run_pays_nothing_and_says_the_same(tmp_path: Path) -> None:
    with Misbehaving() as server:
        first, _ = ask_all(server, tmp_path, 9)
        second, calls = ask_all(server, tmp_path, 9)
        assert server.calls == 9 and calls.found == 9 and calls.made == 0
    assert first.results == second.results


def test_equal_requests_side_by_side_are_one_call(tmp_path: Path) -> None:
    async def go() -> list[str]:
        with Journal(tmp_path, "test", {}) as journal:
            async with Endpoint(EndpointSettings(server.url, **PATIENT)) as endpoint:
                calls = PaidCalls(endpoint, journal, Budget())
                return await asyncio.gather(*(calls.ask("completions", body(), text_of) for _ in range(8)))

    with Misbehaving(delay=0.05) as server:
        answers = asyncio.run(go())
        assert server.calls == 1
    assert len(set(answers)) == 1


def test_concurrency_is_bounded_and_used(tmp_path: Path) -> None:
    with Misbehaving(delay=0.05) as server:
        ask_all(server, tmp_path, 24, concurrency=6)
        assert 2 <= server.most <= 6


def test_the_rate_limit_spaces_requests(tmp_path: Path) -> None:
    """No request comes before its slot; one may come late on a loaded machine, the first too."""
    with Misbehaving() as server:
        begun = time.monotonic()  # the clock of the server's loop
        ask_all(server, tmp_path, 5, concurrency=5, requests_per_minute=600)
        assert all(at - begun >= 0.1 * slot for slot, at in enumerate(sorted(server.times)))
        assert len(server.times) == 5


@pytest.mark.parametrize("concurrency", [1, 8])
def test_max_calls_is_never_exceeded_even_side_by_side(concurrency: int, tmp_path: Path) -> None:
    with Misbehaving(delay=0.01) as server:
        outcome, _ = ask_all(server, tmp_path, 30, concurrency, bounds={"max_calls": 7})
        assert server.calls == 7 and len(outcome.results) == 7
        assert isinstance(outcome.stopped, BudgetSpent) and "max_calls = 7" in str(outcome.stopped)
        outcome, _ = ask_all(server, tmp_path, 30, concurrency, bounds={"max_calls": 12})
        assert server.calls == 12 and len(outcome.results) == 12  # of the folder, not of the run
        outcome, _ = ask_all(server, tmp_path, 30, concurrency)
        assert server.calls == 30 and not outcome.stopped


def test_max_cost_is_never_exceeded(tmp_path: Path) -> None:
    prices = Prices(input=1e5, output=1e5)  # a call uses 2 + 5 tokens, and could use 4 + 5
    with Misbehaving(delay=0.01) as server:
        outcome, calls = ask_all(server, tmp_path, 30, 8, bounds={"max_cost": 10.05, "prices": prices})
    assert calls.budget.cost <= 10.05 and len(outcome.results) == 14
    assert isinstance(outcome.stopped, BudgetSpent)


def test_refused_attempts_are_free_and_lost_ones_count(tmp_path: Path) -> None:
    with Misbehaving(lambda count, request: Fault(500) if count < 2 else None) as server:
        assert len(ask_all(server, tmp_path / "a", bounds={"max_calls": 1})[0].results) == 1
    with Misbehaving(lambda count, request: Fault(raw=b"") if count < 2 else None) as server:
        outcome, _ = ask_all(server, tmp_path / "b", bounds={"max_calls": 2})
        assert not outcome.results and isinstance(outcome.stopped, BudgetSpent) and server.calls == 2


BODIES = {
    "a gzip bomb": (gzip.compress(b'{"choices":"' + b"a" * 2**25 + b'"}', 1), {"content-encoding": "gzip"}),
    "a body beyond the bound": (b"[" + b"1," * 2**23 + b"1]", {}),
    "deep JSON": (b'{"choices":' + b"[" * 200_000 + b"]" * 200_000 + b"}", {}),
    "a field twice": (b'{"choices": [{"text": "a"}], "choices": [{"text": "b"}]}', {}),
    "an encoding not asked for": (b"abc", {"content-encoding": "br"}),
    "a cut gzip": (gzip.compress(b'{"choices": [{"text": "a"}]}', mtime=0)[:-9], {"content-encoding": "gzip"}),
    "no gzip at all": (b'{"choices": [{"text": "a"}]}', {"content-encoding": "gzip"}),
    "events": (b'data: {"choices": [{"text": "a"}]}\n\n', {"content-type": "text/event-stream"}),
    "no UTF-8": (b'{"choices": [{"text": "\xe9"}]}', {"content-type": "application/json; charset=latin-1"}),
}


def framed(content: bytes, headers: dict[str, str], status: int = 200) -> Fault:
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content)}", *(f"{k}: {v}" for k, v in headers.items())]
    return Fault(raw="\r\n".join([*lines, "", ""]).encode() + content)


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_cannot_be_read_costs_one_job(name: str, tmp_path: Path) -> None:
    bad = framed(*BODIES[name])
    with Misbehaving(lambda count, request: bad if request["prompt"] == "question 1" else None) as server:
        outcome, calls = ask_all(server, tmp_path, 3, max_attempts=2)
    assert sorted(outcome.results) == [0, 2] and "unusable answer: it" in outcome.failed[1]
    # What is beyond the bound would come again, at the full price.
    assert calls.journal.lost == (1 if name in ("a gzip bomb", "a body beyond the bound") else 2)


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (gzip.compress(b'{"choices": [{"text": "a"}]}', mtime=0), {"content-encoding": "gzip"}),
        (zlib.compress(b'{"choices": [{"text": "a"}]}'), {"content-encoding": "deflate"}),
        ('{"choices": [{"text": "a"}]}'.encode("utf-16"), {"content-type": "text/html; charset=no-such"}),
        (b'\xef\xbb\xbf{"choices": [{"text": "a"}]}', {"set-cookie": "a=\x01"}),
    ],
    ids=["gzip", "deflate", "an unknown charset", "a byte order mark"],
)
def test_bodies_of_other_forms_are_read(content: bytes, headers: dict[str, str], tmp_path: Path) -> None:
    with Misbehaving(lambda count, request: framed(content, headers)) as server:
        outcome, _ = ask_all(server, tmp_path)
    assert outcome.results == {0: "a"}


def test_the_usage_of_an_answer_is_its_own_or_the_worst(tmp_path: Path) -> None:
    odd = iter(["1" + "0" * 400, "1.5", "-1", "null", "{}", "true", "99999999", '"5"', "1e3"])

    def answer(good: dict[str, Any]) -> str:
        return json.dumps(good).replace('"completion_tokens": 5', f'"completion_tokens": {next(odd)}')

    with Misbehaving(lambda count, request: Fault(answer=answer)) as server:
        outcome, calls = ask_all(server, tmp_path, 9, concurrency=1)
    assert len(outcome.results) == 9 and calls.budget.spent == calls.journal.spent
    assert calls.budget.spent.output == 9 * 5  # max_tokens of each


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_is_not_followed(status: int, tmp_path: Path) -> None:
    with Misbehaving() as other:
        target = other.url.replace("127.0.0.1", "localhost") + "/completions"
        with Misbehaving(lambda count, request: Fault(status, {"location": target})) as server:
            outcome, calls = ask_all(server, tmp_path, 5, concurrency=1)
            assert server.calls == 1 and other.calls == 0
    assert isinstance(outcome.stopped, EndpointRefused) and "localhost" in str(outcome.stopped)
    assert calls.budget.calls == 0


def test_a_redirect_on_the_same_host_is_followed_and_in_circles_given_up(tmp_path: Path) -> None:
    def script(count: int, request: dict[str, Any]) -> Fault | None:
        there = "/elsewhere/completions" if request["prompt"] == "question 0" else "/v1/completions"
        return Fault(307, {"location": there}) if count == 0 or there.startswith("/v1") else None

    with Misbehaving(script) as server:
        outcome, _ = ask_all(server, tmp_path, 2, concurrency=1)
    assert list(outcome.results) == [0] and "redirects in circles" in outcome.failed[1]


@pytest.mark.parametrize("status", [403, 404, 307])
def test_what_one_request_is_refused_after_others_were_answered_is_its_own(status: int, tmp_path: Path) -> None:
    """A filter's 403, say: the run goes on; but not for long where nothing else comes any more."""

    def script(count: int, request: dict[str, Any]) -> Fault | None:
        return Fault(status, {"location": "http://other.invalid/"}) if request["prompt"] in bad else None

    bad = {"question 1"}
    with Misbehaving(script) as server:
        outcome, _ = ask_all(server, tmp_path / "a", 4, concurrency=1)
        assert sorted(outcome.results) == [0, 2, 3] and outcome.stopped is None
        bad = {f"question {i}" for i in range(1, 90)}
        outcome, _ = ask_all(server, tmp_path / "b", 90, concurrency=1)
        assert len(outcome.failed) == 25 and "25 jobs in a row" in str(outcome.stopped)


def test_a_job_may_set_itself_aside() -> None:
    async def work(job: int) -> int:
        if job == 2:
            raise Unfinished("no")
        if job == 3:
            raise CallFailed("gone")
        return job

    outcome = asyncio.run(run_jobs(range(5), work, concurrency=2))
    assert outcome.results == {0: 0, 1: 1, 4: 4} and outcome.failed == {2: "no", 3: "gone"}


def test_any_other_error_is_raised() -> None:
    async def work(job: int) -> int:
        raise KeyError(job)

    with pytest.raises(KeyError):
        asyncio.run(run_jobs(range(5), work, concurrency=2))
