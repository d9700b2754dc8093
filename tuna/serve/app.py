"""The HTTP side: routes and streams."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import Any, TypeVar

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tuna.chat import ChatTemplate
from tuna.constrained import Constraint, json_constraint
from tuna.decoding import Row, Sampling, end_tokens, position_limit
from tuna.records import Record
from tuna.serve.answers import Part, Unsent, chat_logprobs, completion_logprobs, echo_part, joined, part_of, usage
from tuna.serve.engine import Busy, Engine, RowTask
from tuna.serve.errors import ApiError, answer_errors
from tuna.serve.protocol import ChatRequest, CompletionRequest, RankRequest, SamplingRequest
from tuna.templates import DEFAULT
from tuna.tokenization import encode_prompts, tokenize_records
from tuna.vocabulary import check_vocabulary, vocabulary_of
from tuna_kernels import pack_groups
from tuna_kernels.integrations.transformers import score_groups

__all__ = ["create_app"]

T = TypeVar("T")


def create_app(engine: Engine, name: str, *, default_max_tokens: int = 512, template: str = DEFAULT) -> FastAPI:
    """The server over an engine, which is closed with it.

    Args:
        engine: runs the model.
        name: what the model is called in requests and answers.
        default_max_tokens: longest chat answer where a request names none.
        template: how /v1/rank shows a plain prompt where a request names none: that of training.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="tuna serve", lifespan=lifespan)
    handlers = _Handlers(engine, name, default_max_tokens, template)
    app.get("/v1/models")(handlers.models)
    app.get("/v1/models/{model:path}")(handlers.model)
    app.post("/v1/completions")(handlers.completions)
    app.post("/v1/chat/completions")(handlers.chat)
    app.post("/v1/rank")(handlers.rank)
    app.get("/health")(lambda: {"status": "ok"})
    answer_errors(app)
    return app


class _Handlers:
    """One method a route."""

    def __init__(self, engine: Engine, name: str, default_max_tokens: int, template: str) -> None:
        self.engine, self.name, self.default_max_tokens, self.template = engine, name, default_max_tokens, template
        self.tokenizer = engine.tokenizer
        self.created = int(time.time())
        self.limit = position_limit(engine.model)
        # Read off once: finding the end of a turn renders the chat template.
        self.ends = {chat: end_tokens(engine.model, engine.tokenizer, chat=chat) for chat in (False, True)}

    async def models(self) -> Any:
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, model: str) -> Any:
        self._check_model(model)
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "tuna"}

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self._check_model(body.model)
        prompts = [self._prompt_ids(prompt) for prompt in body.prompts()]
        texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in body.prompts()]
        groups = [
            self._tasks(ids, body, False, body.max_tokens, body.logprobs or 0, i) for i, ids in enumerate(prompts)
        ]
        tasks = [task for group in groups for task in group]
        echoes = await self._echoes(body, prompts, [str(text) for text in texts])
        shown = [echo for echo in echoes for _ in range(body.n)]
        tokens = sum(map(len, prompts))

        def choice(index: int, part: Part, finish: str | None, first: bool) -> dict[str, Any]:
            logprobs = None if body.logprobs is None else completion_logprobs(part, self.tokenizer)
            return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": finish}

        head = self._head("cmpl", "text_completion")
        if body.stream:
            return self._stream(body, tasks, tokens, head, choice, shown)
        rows = await self._finished(tasks, request)
        if body.max_tokens == 0:
            choices = [choice(i, echo, "length", True) for i, echo in enumerate(shown)]
        else:
            choices = [
                choice(i, joined(echo, part_of(row, self.tokenizer, shift=len(echo.text))), row.finish_reason, True)
                for i, (echo, row) in enumerate(zip(shown, rows, strict=True))
            ]
        return JSONResponse({**head, "choices": choices, "usage": usage(tokens, rows)})

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check_model(body.model)
        ids = self._prompt_ids(self._render(body), "chat")
        asked = body.max_completion_tokens or body.max_tokens
        room = self.default_max_tokens if self.limit is None else max(1, self.limit - len(ids))
        tasks = self._tasks(ids, body, True, asked or min(self.default_max_tokens, room), body.top_logprobs or 0, 0)
        schema = body.response_format.schema_asked() if body.response_format is not None else None
        if schema is not None:
            for task in tasks:
                task.row.constraint = self._constraint(schema)

        def choice(index: int, part: Part, finish: str | None, first: bool) -> dict[str, Any]:
            logprobs = chat_logprobs(part, self.tokenizer) if body.logprobs else None
            content = {"content": part.text} | ({"role": "assistant"} if first or not body.stream else {})
            key = "delta" if body.stream else "message"
            return {"index": index, key: content, "logprobs": logprobs, "finish_reason": finish}

        if body.stream:
            head = self._head("chatcmpl", "chat.completion.chunk")
            return self._stream(body, tasks, len(ids), head, choice, [NOTHING] * body.n)
        rows = await self._finished(tasks, request)
        choices = [choice(i, part_of(row, self.tokenizer), row.finish_reason, True) for i, row in enumerate(rows)]
        head = self._head("chatcmpl", "chat.completion")
        return JSONResponse({**head, "choices": choices, "usage": usage(len(ids), rows)})

    async def rank(self, body: RankRequest) -> Response:
        if body.model is not None:
            self._check_model(body.model)
        template = body.template or ("chat" if body.messages is not None else self.template)
        fields = body.model_dump(include={"prompt", "messages", "responses"})
        record = Record.model_validate({"id": "request", **fields, "scores": [0.0] * len(body.responses)})
        length = body.max_length or self.limit or 1 << 20
        groups, _ = tokenize_records([record], self.tokenizer, template=template, max_length=length)
        check_vocabulary(self.engine.model, groups, self.tokenizer)
        answer = await self._run(lambda: _rank(self.engine, groups[0].group, body))
        return JSONResponse(self._head("rank", "rank") | answer | {"cut_responses": groups[0].cut_responses})

    def _check_model(self, model: str) -> None:
        if model != self.name:
            message = f"the model {model!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _head(self, prefix: str, kind: str) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    def _render(self, body: ChatRequest) -> str:
        if self.tokenizer.chat_template is None:
            raise ApiError(400, f"the model {self.name!r} has no chat template: use /v1/completions")
        turns = [message.model_dump() for message in body.messages]
        try:
            # Not through a Record: that one asks for a last turn that is not the assistant's.
            return ChatTemplate(self.tokenizer).prompt(turns, "messages")
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error

    def _constraint(self, schema: dict[str, Any]) -> Constraint:
        try:
            return json_constraint(self.tokenizer, sorted(self.ends[True]), schema)
        except ModuleNotFoundError as error:
            message = f"response_format needs a package that this server lacks: pip install {error.name}"
            raise ApiError(400, message, param="response_format") from error
        except ValueError as error:
            raise ApiError(400, str(error), param="response_format") from error

    def _prompt_ids(self, prompt: str | list[int], template: str = "none") -> list[int]:
        size = min(len(self.tokenizer), vocabulary_of(self.engine.model))
        ids = encode_prompts(self.tokenizer, [prompt], template=template)[0] if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, "prompt has no tokens", param="prompt")
        if wrong := [token for token in ids if not 0 <= token < size]:
            raise ApiError(400, f"prompt holds token {wrong[0]}, the vocabulary has {size}", param="prompt")
        return ids

    def _tasks(
        self, ids: list[int], body: SamplingRequest, chat: bool, max_tokens: int, top: int, number: int
    ) -> list[RowTask]:
        """The n rows of a prompt, the ``number``-th of its request."""
        if self.limit is not None and len(ids) + max_tokens > self.limit:
            message = (
                f"the prompt has {len(ids)} tokens, which with max_tokens = {max_tokens} goes beyond the "
                f"{self.limit} positions of the model"
            )
            raise ApiError(400, message, code="context_length_exceeded")
        if max_tokens == 0:
            return []
        seed = secrets.randbits(63) if body.seed is None else body.seed % (1 << 64)
        return [
            RowTask(
                Row(
                    ids,
                    Sampling(
                        max_tokens=max_tokens,
                        temperature=body.temperature,
                        top_p=body.top_p,
                        seed=(seed, number, i),
                        stop=tuple(body.stop),
                        top_logprobs=top,
                    ),
                    self.ends[chat],
                )
            )
            for i in range(body.n)
        ]

    async def _echoes(self, body: CompletionRequest, prompts: list[list[int]], texts: list[str]) -> list[Part]:
        if not body.echo:
            return [NOTHING] * len(prompts)
        engine, top = self.engine, body.logprobs

        def work() -> list[Part]:
            pairs = zip(prompts, texts, strict=True)
            return [echo_part(engine.model, engine.tokenizer, ids, text, top) for ids, text in pairs]

        return work() if top is None else await self._run(work)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            future = self.engine.call(work)
        except Busy as error:
            raise ApiError(429, str(error), code="queue_full") from error
        return await asyncio.wrap_future(future)

    async def _finished(self, tasks: list[RowTask], request: Request) -> list[Row]:
        """The rows when all are done; a client that hangs up frees its rows."""
        if not tasks:
            return []
        self._submit(tasks)
        done = asyncio.ensure_future(asyncio.gather(*(asyncio.wrap_future(task.done) for task in tasks)))
        gone = asyncio.ensure_future(_disconnected(request))
        waiters: list[asyncio.Future[Any]] = [done, gone]
        try:
            await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ApiError(499, "the client closed the connection")
            return await done
        except (asyncio.CancelledError, Busy) as error:
            raise ApiError(503, "the server is shutting down") from error
        finally:
            for task in tasks:
                task.cancelled = True
            for waiter in waiters:
                waiter.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await waiter

    def _submit(self, tasks: list[RowTask]) -> None:
        if len(tasks) > self.engine.max_waiting:
            raise ApiError(
                400, f"{len(tasks)} answers in one request are more than the {self.engine.max_waiting} that may wait"
            )
        try:
            self.engine.submit(tasks)
        except Busy as error:
            raise ApiError(429, str(error), code="queue_full") from error

    def _stream(
        self,
        body: SamplingRequest,
        tasks: list[RowTask],
        prompt_tokens: int,
        head: dict[str, Any],
        choice: Callable[[int, Part, str | None, bool], dict[str, Any]],
        echoes: Sequence[Part],
    ) -> Response:
        """Server-sent events: a chunk whenever a row has text that may be sent."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        with_usage = body.stream_options is not None and body.stream_options.include_usage

        def forward(index: int, task: RowTask) -> None:
            unsent = Unsent(self.tokenizer, len(echoes[index].text))

            def on_token(row: Row) -> None:  # on the engine's thread
                part, finish = unsent.take(row), row.finish_reason
                if part is not None:
                    loop.call_soon_threadsafe(queue.put_nowait, (index, part, finish))

            def on_done(future: Any) -> None:
                failed = future.cancelled() or future.exception() is not None
                if failed:
                    reason = "the server is shutting down" if future.cancelled() else str(future.exception())
                    with suppress(RuntimeError):  # the loop may be closed by then
                        loop.call_soon_threadsafe(queue.put_nowait, reason)

            task.on_token = on_token
            task.done.add_done_callback(on_done)

        for index, task in enumerate(tasks):
            forward(index, task)
        if tasks:
            self._submit(tasks)

        async def events() -> AsyncIterator[str]:
            first = set(range(len(echoes)))
            try:
                for index, echo in enumerate(echoes):
                    if echo.text or not tasks:
                        first.discard(index)
                        end = None if tasks else "length"
                        yield _event({**head, "choices": [choice(index, echo, end, True)]})
                left = len(tasks)
                while left:
                    item = await queue.get()
                    if isinstance(item, str):
                        yield _event(json.loads(bytes(ApiError(500, item).response().body)))
                        return
                    index, part, finish = item
                    yield _event({**head, "choices": [choice(index, part, finish, index in first)]})
                    first.discard(index)
                    left -= finish is not None
                if with_usage:
                    counted = usage(prompt_tokens, [task.row for task in tasks])
                    yield _event({**head, "choices": [], "usage": counted})
                yield "data: [DONE]\n\n"
            finally:  # also when the client hangs up
                for task in tasks:
                    task.cancelled = True

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


NOTHING = Part("", [], [], [], [])


def _rank(engine: Engine, group: Any, body: RankRequest) -> dict[str, Any]:
    """Scores of all responses of a group, on the engine's thread."""
    tree = pack_groups([group])
    with torch.inference_mode():
        found = score_groups(engine.model, tree, length_penalty=body.length_penalty)
    scores, logprobs = found.scores.double().tolist(), found.logprobs.double().tolist()
    levels = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    results = []
    for index, (start, end) in enumerate(pairwise(tree.candidate_offsets_host.tolist())):
        result: dict[str, Any] = {
            "index": index,
            "score": scores[index],
            "rank": levels[scores[index]],
            "tokens": end - start,
            "logprob_sum": sum(logprobs[start:end]),
            "logprob_mean": sum(logprobs[start:end]) / (end - start),
        }
        if body.logprobs:
            result |= {"token_ids": tree.targets[start:end].tolist(), "token_logprobs": logprobs[start:end]}
        results.append(result)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    tokens = {"computed_tokens": tree.num_tokens, "unshared_tokens": tree.unshared_tokens}
    return {"length_penalty": body.length_penalty, "order": order, "results": results, "usage": tokens}


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
