"""An OpenAI-compatible HTTP server on loopback that misbehaves on order, and keeps the books.

It is a real server over real sockets, written on bare asyncio so that it can break HTTP itself. Its answers are a
function of the request alone, so two runs that asked the same must end with the same file. Each answer it sends
whole and good is entered in the books under the content of its request: what the client pays for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

Body = dict[str, Any]
# Given the number of requests of this content so far (from 0) and the request: what to do, or None to behave.
Script = Callable[[int, Body], "Fault | None"]


@dataclass(frozen=True)
class Fault:
    """One way not to answer.

    `status` with `headers` and `body`; `raw` is sent as it is, then the connection is cut; `delay` seconds pass
    first; `answer` makes another answer of the good one.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": {"message": "on purpose"}}'
    raw: bytes | None = None
    delay: float = 0.0
    answer: Callable[[Body], Any] | None = None


def behave(count: int, body: Body) -> Fault | None:
    return None


class Misbehaving:
    """Use as a context manager; `url` is the base URL.

    `requests` counts what came, by content; `paid` what was answered whole and good; `headers` are those of the
    last request; `most` the most requests in flight at once. While `hold` is set, no more than so many are answered.
    """

    def __init__(self, script: Script = behave, *, delay: float = 0.0, judge: Callable[[Body], str] | None = None):
        self.script, self.delay, self.judge = script, delay, judge
        self.requests: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.bodies: list[Body] = []
        self.times: list[float] = []
        self.headers: dict[str, str] = {}
        self.open = self.most = 0
        self.hold: int | None = None

    def __enter__(self) -> Misbehaving:
        ready = threading.Event()

        def run() -> None:
            self.loop = asyncio.new_event_loop()
            self.server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
            ready.set()
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert ready.wait(30)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        def stop() -> None:
            self.server.close()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.call_later(0.05, self.loop.stop)

        self.loop.call_soon_threadsafe(stop)
        self.thread.join(30)
        self.loop.close()

    @property
    def calls(self) -> int:
        return sum(self.requests.values())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                self.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
                length = int(self.headers.get("content-length", 0))
                body = json.loads(await reader.readexactly(length)) if length else {}
                self.open += 1
                self.most = max(self.most, self.open)
                try:
                    keep = await self._respond(first.split()[1], body, writer)
                finally:
                    self.open -= 1
                if not keep:
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _respond(self, path: str, body: Body, writer: asyncio.StreamWriter) -> bool:
        key = json.dumps(body, sort_keys=True)
        count = self.requests[key]
        self.requests[key] += 1
        self.bodies.append(body)
        self.times.append(self.loop.time())
        fault = self.script(count, body)
        await asyncio.sleep(self.delay if fault is None else self.delay + fault.delay)
        while self.hold is not None and sum(self.paid.values()) >= self.hold:
            await asyncio.sleep(0.002)
        good = self._answer(path, body, key)
        if fault is not None and fault.raw is not None:
            writer.write(fault.raw)
            await writer.drain()
            return False
        if fault is not None and fault.status is not None:
            _send(writer, fault.status, fault.body, fault.headers)
            await writer.drain()
            return True
        if fault is not None and fault.answer is not None:
            good = fault.answer(good)
        _send(writer, 200, good if isinstance(good, str) else json.dumps(good), {})
        await writer.drain()
        if fault is None:
            self.paid[key] += 1
        return True

    def _answer(self, path: str, body: Body, key: str) -> Body:
        chat = path.endswith("/chat/completions")
        choices = [self._choice(chat, body, f"{key}{i}", i) for i in range(body.get("n") or 1)]
        used = {
            "prompt_tokens": len(str(body.get("prompt", body.get("messages")))) // 4,
            "completion_tokens": 5 * len(choices),
        }
        return {"id": "x", "object": "completion", "model": body["model"], "choices": choices, "usage": used}

    def _choice(self, chat: bool, body: Body, seed: str, index: int) -> Body:
        digest = hashlib.sha256(seed.encode()).digest()
        text = self.judge(body) if self.judge is not None else f"answer {digest.hex()[:8]}"
        values = [-(byte + 1) / 64 for byte in digest[:5]]
        choice: Body = {"index": index, "finish_reason": "stop"}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
            content = [{"token": "t", "logprob": value} for value in values]
            choice["logprobs"] = {"content": content} if body.get("logprobs") else None
        else:
            choice["text"] = text
            choice["logprobs"] = {"tokens": ["t"] * 5, "token_logprobs": values} if body.get("logprobs") else None
        return choice


def _send(writer: asyncio.StreamWriter, status: int, body: str, headers: dict[str, str]) -> None:
    content = body.encode()
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content)}", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + content)
