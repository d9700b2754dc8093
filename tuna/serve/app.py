"""The HTTP application: routes, and how they use the workers and the engine.

The event loop only waits: requests are parsed and answers serialised by `tuna.serve.workers`, the model runs on the
engine's thread.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from transformers import PreTrainedTokenizerBase

from tuna.data.chat import ChatTemplate
from tuna.data.records import Record
from tuna.data.templates import DEFAULT
from tuna.data.tokenization import TokenizedGroup, encode_prompts, tokenize_records
from tuna.data.vocabulary import check_vocabulary, vocabulary_of
from tuna.models.constrained import Constraint, json_constraint
from tuna.models.decoding import Decoding, Row, end_tokens, position_limit
from tuna.serve.access import Access
from tuna.serve.answers import NOTHING, Part, chat_logprobs, completion_logprobs, echo_part, joined, part_of, usage
from tuna.serve.bodies import MAX_BODY, disconnected, parse, read_body, to_json
from tuna.serve.engine import Busy, Engine, RowTask
from tuna.serve.errors import ApiError, Ending, answer_errors, shown
from tuna.serve.protocol import ChatRequest, CompletionRequest, RankRequest, SamplingRequest
from tuna.serve.rank import parts_of, rank_answer, score_part
from tuna.serve.streams import stream
from tuna.serve.workers import Workers

__all__ = ["create_app"]

T = TypeVar("T")
SHRINKAGE = 4  # a tokenizer's normalisation may merge this many characters into one
CLOSING_SECONDS = 2.0


def create_app(
    engine: Engine,
    name: str,
    *,
    default_max_tokens: int = 512,
    template: str = DEFAULT,
    hosts: Iterable[str] = (),
    api_key: str | None = None,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """Create the application for an engine, which is closed with it.

    Args:
        engine: runs the model.
        name: the model's name in requests and answers.
        default_max_tokens: maximum tokens of a chat answer if a request does not set them.
        template: default template of text prompts in /v1/rank: that of training.
        hosts: names of the server in addition to `localhost` and loopback addresses; see `tuna.serve.access`.
        api_key: key required in requests; None: no key.
        max_body: maximum number of bytes of a request.

    Raises:
        ValueError: a limit below 1, or an invalid host or key.
    """
    for bound, value in (("default_max_tokens", default_max_tokens), ("max_body", max_body)):
        if value < 1:
            raise ValueError(f"{bound} = {value} must be at least 1")
    handlers = _Handlers(engine, name, default_max_tokens, template, max_body)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        handlers.workers.close()
        await asyncio.to_thread(engine.close, CLOSING_SECONDS)

    app = FastAPI(title="tuna serve", lifespan=lifespan, openapi_url=None)
    app.get("/v1/models")(handlers.models)
    app.get("/v1/models/{model:path}")(handlers.model)
    app.post("/v1/completions")(handlers.completions)
    app.post("/v1/chat/completions")(handlers.chat)
    app.post("/v1/rank")(handlers.rank)
    app.get("/health")(handlers.health)
    answer_errors(app)
    hosts = tuple(hosts)
    Access(app, hosts=hosts, api_key=api_key)  # raises here, not at the first request
    app.add_middleware(Access, hosts=hosts, api_key=api_key)
    app.add_middleware(Ending)
    return app


class _Handlers:
    """The request handlers, one method per route."""

    def __init__(self, engine: Engine, name: str, default_max_tokens: int, template: str, max_body: int) -> None:
        self.engine, self.name, self.default_max_tokens, self.max_body = engine, name, default_max_tokens, max_body
        self.template = template
        self.workers = Workers(engine.tokenizer, max_waiting=engine.max_waiting)
        self.created = int(time.time())
        self.limit = position_limit(engine.model)
        # Computed once: finding the end of a turn renders the chat template.
        self.ends = {chat: end_tokens(engine.model, engine.tokenizer, chat=chat) for chat in (False, True)}
        longest = max(map(len, engine.tokenizer.get_vocab()))
        self.most_characters = None if self.limit is None else SHRINKAGE * longest * self.limit

    async def health(self) -> Any:
        return {"status": "ok"}

    async def models(self) -> Any:
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, model: str) -> Any:
        self._check_model(model)
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "tuna"}

    async def completions(self, request: Request) -> Response:
        raw = await read_body(request, self.max_body)

        def prepared(
            tokenizer: PreTrainedTokenizerBase,
        ) -> tuple[CompletionRequest, list[list[int]], list[str], list[RowTask]]:
            body = parse(raw, CompletionRequest)
            self._check_model(body.model)
            self._check_rows(len(body.prompt) * body.n)
            prompts = [self._prompt_ids(prompt, tokenizer) for prompt in body.prompt]
            texts = [p if isinstance(p, str) else str(tokenizer.decode(p)) for p in body.prompt] if body.echo else []
            tasks = [
                task
                for number, ids in enumerate(prompts)
                for task in self._tasks(ids, body, False, body.max_tokens, body.logprobs or 0, number)
            ]
            return body, prompts, texts, tasks

        body, prompts, texts, tasks = await self.workers.run(prepared)
        echoes = await self._echoes(body, prompts, texts)
        shown_before = [echo for echo in echoes for _ in range(body.n)]
        tokens = sum(map(len, prompts))
        tokenizer = self.engine.tokenizer

        def choice(index: int, part: Part, finish: str | None, first: bool) -> dict[str, Any]:
            logprobs = None if body.logprobs is None else completion_logprobs(part, tokenizer)
            return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": finish}

        head = self._head("cmpl", "text_completion")
        if body.stream:
            return self._stream(body, tasks, tokens, head, choice, shown_before)
        rows = await self._finished(tasks, request)

        def written() -> dict[str, Any]:
            if body.max_tokens == 0:
                choices = [choice(i, echo, "length", True) for i, echo in enumerate(shown_before)]
            else:
                choices = [
                    choice(i, joined(echo, part_of(row, tokenizer, shift=len(echo.text))), row.finish_reason, True)
                    for i, (echo, row) in enumerate(zip(shown_before, rows, strict=True))
                ]
            return {**head, "choices": choices, "usage": usage(tokens, rows)}

        return await self._answer(written)

    async def chat(self, request: Request) -> Response:
        raw = await read_body(request, self.max_body)

        def prepared(tokenizer: PreTrainedTokenizerBase) -> tuple[ChatRequest, list[int], list[Constraint | None]]:
            body = parse(raw, ChatRequest)
            self._check_model(body.model)
            self._check_rows(body.n)
            ids = self._prompt_ids(self._render(body, tokenizer), tokenizer, "chat")
            schema = body.response_format.schema_asked() if body.response_format is not None else None
            constraints = [None if schema is None else self._constraint(schema, tokenizer) for _ in range(body.n)]
            return body, ids, constraints

        body, ids, constraints = await self.workers.run(prepared)
        asked = body.max_completion_tokens or body.max_tokens
        room = self.default_max_tokens if self.limit is None else max(1, self.limit - len(ids))
        tasks = self._tasks(ids, body, True, asked or min(self.default_max_tokens, room), body.top_logprobs or 0, 0)
        for task, constraint in zip(tasks, constraints, strict=True):
            task.row.constraint = constraint
        tokenizer = self.engine.tokenizer

        def choice(index: int, part: Part, finish: str | None, first: bool) -> dict[str, Any]:
            logprobs = chat_logprobs(part, tokenizer) if body.logprobs else None
            content = {"content": part.text} | ({"role": "assistant"} if first or not body.stream else {})
            key = "delta" if body.stream else "message"
            return {"index": index, key: content, "logprobs": logprobs, "finish_reason": finish}

        if body.stream:
            head = self._head("chatcmpl", "chat.completion.chunk")
            return self._stream(body, tasks, len(ids), head, choice, [NOTHING] * body.n)
        rows = await self._finished(tasks, request)
        head = self._head("chatcmpl", "chat.completion")

        def written() -> dict[str, Any]:
            choices = [choice(i, part_of(row, tokenizer), row.finish_reason, True) for i, row in enumerate(rows)]
            return {**head, "choices": choices, "usage": usage(len(ids), rows)}

        return await self._answer(written)

    async def rank(self, request: Request) -> Response:
        raw = await read_body(request, self.max_body)

        def prepared(tokenizer: PreTrainedTokenizerBase) -> tuple[RankRequest, TokenizedGroup]:
            body = parse(raw, RankRequest)
            if body.model is not None:
                self._check_model(body.model)
            self._check_rows(len(body.responses))
            self._check_text("prompt", body.prompt or "")
            for turn in body.messages or ():
                self._check_text("message", turn.content)
            for response in body.responses:
                self._check_text("response", response)
            template = body.template or ("chat" if body.messages is not None else self.template)
            fields = body.model_dump(include={"prompt", "messages", "responses"})
            record = Record.model_validate({"id": "request", **fields, "scores": [0.0] * len(body.responses)})
            length = body.max_length or self.limit or self.engine.max_tokens
            groups, problems = tokenize_records(
                [record], tokenizer, template=template, max_length=length, on_bad="skip"
            )
            if problems:
                raise ApiError(400, problems[0].reason)
            check_vocabulary(self.engine.model, groups, tokenizer)
            return body, groups[0]

        body, found = await self.workers.run(prepared)
        model, penalty = self.engine.model, body.length_penalty
        parts = [
            await self._run(lambda part=part: score_part(model, part, penalty))  # type: ignore[misc]
            for part in parts_of(found.group, self.engine.max_tokens)
        ]
        head = self._head("rank", "rank")

        def written() -> dict[str, Any]:
            answer = rank_answer(found.group, parts, length_penalty=penalty, with_logprobs=body.logprobs)
            return head | answer | {"cut_responses": found.cut_responses}

        return await self._answer(written)

    async def _answer(self, written: Callable[[], dict[str, Any]]) -> Response:
        """Send an answer as JSON, serialised by a worker since many log-probabilities take long."""
        content = await self.workers.run(lambda _: to_json(written()))
        return Response(content, media_type="application/json")

    def _check_model(self, model: str) -> None:
        if model != self.name:
            message = f"the model {shown(model)} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_rows(self, rows: int) -> None:
        """Reject too many rows before they are created."""
        most = self.engine.max_waiting
        if rows > most:
            raise ApiError(400, f"{rows:,} answers in one request are more than the {most:,} that may wait")

    def _check_text(self, what: str, text: str) -> None:
        """Reject text that is too long under any tokenisation, without tokenising it."""
        if self.most_characters is not None and len(text) > self.most_characters:
            message = f"a {what} of {len(text):,} characters exceeds the {self.limit} positions of the model"
            raise ApiError(400, message, param=what, code="context_length_exceeded")

    def _head(self, prefix: str, kind: str) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    def _render(self, body: ChatRequest, tokenizer: PreTrainedTokenizerBase) -> str:
        if tokenizer.chat_template is None:
            raise ApiError(400, f"the model {self.name!r} has no chat template: use /v1/completions")
        turns = [message.model_dump() for message in body.messages]
        try:
            # Not through a Record, whose last turn must not be the assistant's.
            return ChatTemplate(tokenizer).prompt(turns, "messages")
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error

    def _constraint(self, schema: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Constraint:
        try:
            return json_constraint(tokenizer, sorted(self.ends[True]), schema)
        except ModuleNotFoundError as error:
            message = f"response_format needs a package that is missing on this server: pip install {error.name}"
            raise ApiError(400, message, param="response_format") from error
        except ValueError as error:
            raise ApiError(400, str(error), param="response_format") from error

    def _prompt_ids(
        self, prompt: str | list[int], tokenizer: PreTrainedTokenizerBase, template: str = "none"
    ) -> list[int]:
        size = min(len(tokenizer), vocabulary_of(self.engine.model))
        if isinstance(prompt, str):
            self._check_text("prompt", prompt)
            ids = encode_prompts(tokenizer, [prompt], template=template)[0]
        else:
            ids = prompt
        if not ids:
            raise ApiError(400, "prompt has no tokens", param="prompt")
        if wrong := [token for token in ids if not 0 <= token < size]:
            raise ApiError(400, f"prompt has token {wrong[0]}, but the vocabulary has {size} tokens", param="prompt")
        return ids

    def _tasks(
        self, ids: list[int], body: SamplingRequest, chat: bool, max_tokens: int, top: int, number: int
    ) -> list[RowTask]:
        """The n rows of prompt `number` of a request."""
        if self.limit is not None and len(ids) + max_tokens > self.limit:
            message = (
                f"the prompt has {len(ids)} tokens, which with max_tokens = {max_tokens} exceeds the "
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
                    Decoding(
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
        model, tokenizer, top = self.engine.model, self.engine.tokenizer, body.logprobs
        if top is None:
            return [echo_part(model, tokenizer, ids, text, top) for ids, text in zip(prompts, texts, strict=True)]
        return [
            await self._run(lambda ids=ids, text=text: echo_part(model, tokenizer, ids, text, top))  # type: ignore[misc]
            for ids, text in zip(prompts, texts, strict=True)
        ]

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            future = self.engine.call(work)
        except Busy as error:
            raise ApiError(429, str(error), code="queue_full") from error
        return await asyncio.wrap_future(future)

    async def _finished(self, tasks: list[RowTask], request: Request) -> list[Row]:
        """Wait for all rows; if the client disconnects, its rows are cancelled."""
        if not tasks:
            return []
        self._submit(tasks)
        done = asyncio.ensure_future(asyncio.gather(*(asyncio.wrap_future(task.done) for task in tasks)))
        gone = asyncio.ensure_future(disconnected(request))
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

    def _submit(self, tasks: Sequence[RowTask]) -> None:
        try:
            self.engine.submit(list(tasks))
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
        settings: dict[str, Any] = {"head": head, "echoes": echoes, "prompt_tokens": prompt_tokens}
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        tokenizer = self.engine.tokenizer
        return stream(tasks, self._submit, choice, tokenizer=tokenizer, with_usage=with_usage, **settings)
