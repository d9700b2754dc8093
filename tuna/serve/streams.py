"""Streaming of an answer as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from tuna.models.decoding import Row
from tuna.serve.answers import Part, Unsent, usage
from tuna.serve.engine import RowTask
from tuna.serve.errors import ApiError

__all__ = ["Choice", "stream"]

Choice = Callable[[int, Part, "str | None", bool], dict[str, Any]]
"""From row index, part, finish reason and whether it is the row's first part, to a choice in OpenAI's format."""


def stream(
    tasks: Sequence[RowTask],
    submit: Callable[[Sequence[RowTask]], None],
    choice: Choice,
    *,
    tokenizer: PreTrainedTokenizerBase,
    head: dict[str, Any],
    echoes: Sequence[Part],
    prompt_tokens: int,
    with_usage: bool,
) -> Response:
    """Stream the rows, with a chunk whenever a row has new text that may be sent.

    Args:
        tasks: the rows; empty if only prompts are echoed.
        submit: submits them to the engine.
        choice: makes the choice of a chunk.
        tokenizer: of the model.
        head: the common fields of all chunks.
        echoes: the echoed prompt before each row's text.
        prompt_tokens, with_usage: for a last chunk with token counts.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def forward(index: int, task: RowTask) -> None:
        unsent = Unsent(tokenizer, len(echoes[index].text))

        def on_token(row: Row) -> None:  # on the engine's thread
            part, finish = unsent.take(row), row.finish_reason
            if part is not None:
                with suppress(RuntimeError):  # the loop may already be closed
                    loop.call_soon_threadsafe(queue.put_nowait, (index, part, finish))

        def on_done(future: Any) -> None:
            failed = future.cancelled() or future.exception() is not None
            if failed:
                reason = "the server is shutting down" if future.cancelled() else str(future.exception())
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(queue.put_nowait, reason)

        task.on_token = on_token
        task.done.add_done_callback(on_done)

    for index, task in enumerate(tasks):
        forward(index, task)
    if tasks:
        submit(tasks)

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
        finally:  # also if the client disconnects
            for task in tasks:
                task.cancelled = True

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
