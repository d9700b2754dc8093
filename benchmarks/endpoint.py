"""`python -m benchmarks.endpoint`: requests a second of the paid-calls layer against a stub, and its CPU a record.

A stub endpoint in a process of its own answers every completion after a fixed delay with 4 choices of 32 tokens and
their log-probabilities. Three arms ask it the same at each concurrency, in rounds that interleave:

* `socket`: bare asyncio sockets, the body ready made and the answer thrown away: what stub and machine can do;
* `client`: the official client, with no retries, journal or budget;
* `tuna`: `tuna generate`'s own way, from an instruction to a response set with its journal on the disk (fsync).

The ideal is concurrency / delay. CPU times are those of the asking process; `own` is tuna's less the client's. The
last row reads a finished journal back: a rerun that has nothing to pay for. Writes endpoint.json, .md and .png.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from tuna.data.instructions import Instruction
from tuna.gather.api.calls import PaidSettings, run_jobs, run_paid
from tuna.gather.api.journal import Journal
from tuna.gather.api.settings import EndpointSettings
from tuna.gather.teacher import Sampling, generate_responses
from tuna.system.writing import replacing, write_json

CONCURRENCY = (1, 8, 64)
ARMS = ("socket", "client", "tuna")
SAMPLING = Sampling(model="stub", api="completions", n=4, max_tokens=32)
TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """One arm in one round: requests, wall and process CPU seconds."""

    arm: str
    concurrency: int
    requests: int
    wall: float
    cpu: float


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results/local"),
    delay: Annotated[float, typer.Option(help="Seconds the stub takes for an answer.")] = 0.02,
    requests: Annotated[int, typer.Option(help="Requests an arm at concurrency 64; fewer at 8 and 1.")] = 640,
    rounds: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 3,
) -> None:
    """Requests a second and CPU a record at concurrency 1, 8 and 64, against a stub endpoint."""
    if rounds < 1 or requests < 64 or not delay >= 0:
        raise ValueError(f"rounds = {rounds}, requests = {requests}, delay = {delay}: at least 1, 64 and 0")
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder, _Stub(delay) as url:
        _measure("client", url, 8, 16, Path(folder) / "warm-up")  # imports, connections
        for turn in range(rounds):
            for concurrency in CONCURRENCY:
                count = max(32, requests * concurrency // 64)
                for arm in ARMS[turn % 3 :] + ARMS[: turn % 3]:
                    place = Path(folder) / f"{turn}-{concurrency}-{arm}"
                    samples.append(_measure(arm, url, concurrency, count, place))
                    if arm == "tuna":
                        again = _measure(arm, url, concurrency, count, place)
                        samples.append(Sample("journal", concurrency, count, again.wall, again.cpu))
    _report(output, samples, delay)


class _Stub:
    """The endpoint, in a process of its own; `url` of it on entry."""

    def __init__(self, delay: float) -> None:
        self.delay = delay

    def __enter__(self) -> str:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_serve, args=(self.delay, theirs), daemon=True)
        self.process.start()
        return f"http://127.0.0.1:{ours.recv()}/v1"

    def __exit__(self, *details: object) -> None:
        self.process.terminate()
        self.process.join()


def _serve(delay: float, pipe: Connection) -> None:
    values = [-0.125 * (i % 9) for i in range(TOKENS)]
    logprobs = {"tokens": ["word"] * TOKENS, "token_logprobs": values}
    text = "word " * TOKENS
    choices = [{"index": i, "text": text, "finish_reason": "stop", "logprobs": logprobs} for i in range(4)]
    usage = {"prompt_tokens": 12, "completion_tokens": 4 * TOKENS}
    body = json.dumps({"id": "x", "model": "stub", "choices": choices, "usage": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                given = await reader.readuntil(b"\r\n\r\n")
                length = int(given.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                await reader.readexactly(length)
                await asyncio.sleep(delay)
                writer.write(head + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def _measure(arm: str, url: str, concurrency: int, count: int, folder: Path) -> Sample:
    items = [Instruction(id=f"q{i}", prompt=f"Question number {i}: what is {i} times {i}?") for i in range(count)]
    ask = {"socket": _by_socket, "client": _by_client, "tuna": _by_tuna}[arm]
    wall, cpu = time.perf_counter(), time.process_time()
    done = asyncio.run(ask(url, items, concurrency, folder))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if done != count:
        raise RuntimeError(f"{arm}: {done} of {count} requests were answered")
    return Sample(arm, concurrency, count, wall, cpu)


async def _by_socket(url: str, items: list[Instruction], concurrency: int, folder: Path) -> int:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(item: Instruction) -> int:
        reader, writer = free.pop() if free else await asyncio.open_connection(host, int(port))
        body = json.dumps(SAMPLING.request(item).body).encode()
        writer.write(f"POST /v1/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        answer = await reader.readexactly(length)
        free.append((reader, writer))
        return len(answer)

    done = await _all(items, ask, concurrency)
    for _, writer in free:
        writer.close()
    return done


async def _by_client(url: str, items: list[Instruction], concurrency: int, folder: Path) -> int:
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        return await _all(
            items,
            lambda item: client.post("/completions", cast_to=object, body=dict(SAMPLING.request(item).body)),
            concurrency,
        )


async def _by_tuna(url: str, items: list[Instruction], concurrency: int, folder: Path) -> int:
    settings = PaidSettings(EndpointSettings(url), concurrency)
    with Journal(folder, "benchmark", {}) as journal:
        outcome, _ = await run_paid(journal, settings, items, lambda calls, x: generate_responses(calls, SAMPLING, x))
    return len(outcome.results)


async def _all(items: list[Instruction], ask: Callable[[Instruction], Awaitable[Any]], concurrency: int) -> int:
    return len((await run_jobs(items, ask, concurrency=concurrency)).results)


def _report(output: Path, samples: list[Sample], delay: float) -> None:
    machine = describe_machine(("openai",))
    rows = [_row(samples, concurrency, delay) for concurrency in CONCURRENCY]
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"program": "endpoint", "created": created, "machine": asdict(machine), "delay": delay}
    write_json(output / "endpoint.json", {**record, "rows": rows, "samples": [asdict(item) for item in samples]})
    header = list(rows[0])
    table = Table(*header, title=f"Requests a second (rps) and CPU a record, stub delay {1000 * delay:g} ms")
    lines = [" | ".join(header), " | ".join("---:" for _ in header)]
    for row in rows:
        cells = [f"{value:.4g}" for value in row.values()]
        table.add_row(*cells)
        lines.append(" | ".join(cells))
    about = f"{machine.processor}, {os.cpu_count()} cores, load {machine.load}, commit {machine.commit}, {created}"
    body = "\n".join(f"| {line} |" for line in lines)
    text = f"# benchmarks.endpoint\n\n{about}; stub delay {1000 * delay:g} ms.\n\n{body}\n"
    with replacing(output / "endpoint.md") as file:
        file.write(text.encode())
    _draw(output / "endpoint.png", rows)
    console = Console()
    console.print(table)
    console.print(f"{about}\nwritten: {output / 'endpoint'}.json, .md and .png", highlight=False)


def _row(samples: list[Sample], concurrency: int, delay: float) -> dict[str, float]:
    """Medians over the rounds; `own` is taken within each round."""

    def of(arm: str) -> list[Sample]:
        return [item for item in samples if item.arm == arm and item.concurrency == concurrency]

    row: dict[str, float] = {"concurrency": concurrency, "ideal rps": concurrency / delay if delay else 0.0}
    for arm in ARMS:
        row[f"{arm} rps"] = median(item.requests / item.wall for item in of(arm))
    for arm in ("client", "tuna"):
        row[f"{arm} CPU ms"] = median(1000 * item.cpu / item.requests for item in of(arm))
    pairs = zip(of("tuna"), of("client"), strict=True)
    row["own CPU ms"] = median(1000 * (ours.cpu - theirs.cpu) / ours.requests for ours, theirs in pairs)
    row["journal CPU ms"] = median(1000 * item.cpu / item.requests for item in of("journal"))
    return row


def _draw(path: Path, rows: list[dict[str, float]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = {
        "ideal": ("#94a3b8", ":"),
        "socket": ("#94a3b8", "-"),
        "client": ("#0f766e", "-"),
        "tuna": ("#c2410c", "-"),
    }
    for arm, (colour, line) in styles.items():
        axes.plot(
            [r["concurrency"] for r in rows], [r[f"{arm} rps"] for r in rows], line, color=colour, label=arm, marker="o"
        )
    axes.set(xscale="log", yscale="log", xlabel="concurrency", ylabel="requests a second")
    axes.set_xticks(CONCURRENCY, [str(value) for value in CONCURRENCY])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    typer.run(main)
