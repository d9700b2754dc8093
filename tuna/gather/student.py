"""Diverse responses of the student, k per instruction, to be ranked by a judge.

If two of the k are too similar (ROUGE-L at `alike` or above), all k are sampled again at a higher temperature, with at
most `tries` tries in total; the try whose most similar pair is least similar is kept. The student runs locally, several
instructions at once, or behind an endpoint.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuna.data.chat import ChatTemplate
from tuna.data.instructions import Instruction
from tuna.data.records import Record
from tuna.data.templates import Renderer
from tuna.data.tokenization import encode_prompts
from tuna.data.vocabulary import check_tokens
from tuna.gather.api.budget import Usage
from tuna.gather.api.calls import PaidCalls
from tuna.gather.api.journal import Journal, content_key
from tuna.gather.responses import Response, ResponseSet
from tuna.gather.sampling import Diversity, LocalSampling, Try
from tuna.gather.teacher import Sampling, generate_responses
from tuna.models.decoding import Row, end_tokens, generate, position_limit

__all__ = ["Diversity", "LocalSampling", "Try", "diverse", "sample_from_endpoint", "sample_locally"]


async def diverse(
    draw: Callable[[float, int], Awaitable[list[Response]]], temperature: float, diversity: Diversity
) -> tuple[Try, int]:
    """The best try of `draw(temperature, number of the try)`, and the number of tries."""
    tries: list[Try] = []
    while not diversity.settled(tries):
        now = diversity.temperature(temperature, len(tries))
        tries.append(Try.of(await draw(now, len(tries)), now))
    return _best(tries), len(tries)


async def sample_from_endpoint(
    calls: PaidCalls, sampling: Sampling, instruction: Instruction, diversity: Diversity
) -> ResponseSet:
    """Diverse responses from a student behind an endpoint; every answer is in the journal of `calls`.

    Raises:
        CallFailed, BudgetSpent: as `tuna.gather.teacher.generate_responses`.
    """
    settings: dict[str, Any] = {}

    async def draw(temperature: float, number: int) -> list[Response]:
        found = await generate_responses(calls, replace(sampling, temperature=temperature), instruction)
        settings.update(found.sampling or {})
        return found.responses

    best, tries = await diverse(draw, sampling.temperature, diversity)
    return sampled_set(instruction, best, tries, sampling.model, settings)


def sampled_set(instruction: Instruction, best: Try, tries: int, model: str, settings: dict[str, Any]) -> ResponseSet:
    """The response set to write: the chosen try, with its temperature and ROUGE-L under `sampling`."""
    notes = {"temperature": best.temperature, "tries": tries, "rouge_worst": best.worst}
    return ResponseSet(
        **instruction.model_dump(), responses=best.responses, model=model, sampling={**settings, **notes}
    )


@dataclass
class _Job:
    instruction: Instruction
    key: str
    prompt: list[int]
    tries: list[Try] = field(default_factory=list)


def sample_locally(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[Instruction],
    sampling: LocalSampling,
    journal: Journal,
    *,
    name: str,
    batch: int = 4,
    on_done: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[ResponseSet], list[str]]:
    """Responses of a local model to all instructions; those already in the journal are not sampled again.

    Args:
        model, tokenizer: the student.
        instructions: the instructions.
        sampling: sampling parameters.
        journal: records each instruction's responses as soon as they are final.
        name: name of the model in the output.
        batch: instructions per batch of `batch * k` rows.
        on_done: called for every finished instruction with the number of tokens sampled (0: it was in the journal).

    Returns:
        The sets, in the order of the instructions, and the reasons for those without one (a prompt beyond the model's
        length).

    Raises:
        ValueError: `batch` below 1; a prompt that cannot be rendered.
    """
    if batch < 1:
        raise ValueError(f"batch = {batch} must be at least 1")
    jobs, problems = _jobs(model, tokenizer, instructions, sampling)
    asyncio.run(_work(model, tokenizer, jobs, sampling, journal, name, batch, on_done))
    return [ResponseSet.model_validate(journal.get(job.key)) for job in jobs], problems


async def _work(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[_Job],
    sampling: LocalSampling,
    journal: Journal,
    name: str,
    batch: int,
    on_done: Callable[[int], None],
) -> None:
    ends = end_tokens(model, tokenizer, chat=sampling.template == "chat")
    chat = Renderer(sampling.template, tokenizer).chat
    # Prompts of similar length together: less padding.
    waiting = deque(sorted((job for job in jobs if job.key not in journal), key=lambda job: len(job.prompt)))
    for _ in range(len(jobs) - len(waiting)):
        on_done(0)
    settings = {name: value for name, value in asdict(sampling).items() if name not in ("diversity", "temperature")}
    while waiting:
        taken = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
        _draw(model, tokenizer, taken, sampling, ends, chat)
        for job in reversed(taken):
            if not sampling.diversity.settled(job.tries):
                waiting.appendleft(job)  # next in line, so that few instructions are unfinished at any time
                continue
            found = sampled_set(job.instruction, _best(job.tries), len(job.tries), name, settings)
            drawn = sum(response.tokens or 0 for one in job.tries for response in one.responses)
            answer = found.model_dump(exclude_none=True)
            await journal.add(job.key, answer, Usage(len(job.prompt) * len(job.tries), drawn))
            on_done(drawn)


def _jobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[Instruction],
    sampling: LocalSampling,
) -> tuple[list[_Job], list[str]]:
    renderer, texts = Renderer(sampling.template, tokenizer), []
    for item in instructions:
        record = Record(id=item.id, prompt=item.prompt, messages=item.messages, responses=[""])
        texts.append(renderer.prompt(record))
    jobs, problems = [], []
    limit = position_limit(model)
    for item, prompt in zip(instructions, encode_prompts(tokenizer, texts, template=sampling.template), strict=True):
        check_tokens(model, prompt, tokenizer, f"instruction {item.id!r}")
        if not prompt or (limit is not None and len(prompt) + sampling.max_tokens > limit):
            problems.append(
                f"instruction {item.id!r}: {len(prompt)} prompt tokens and max_tokens = {sampling.max_tokens} exceed "
                f"the {limit} positions of the model"
            )
        else:
            jobs.append(_Job(item, content_key(item.model_dump(exclude_none=True)), prompt))
    return jobs, problems


def _draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[_Job],
    sampling: LocalSampling,
    ends: frozenset[int],
    chat: ChatTemplate | None,
) -> None:
    """One more try of every job, all as one batch."""
    rows: list[list[Row]] = []
    for job in jobs:
        number = len(job.tries)
        temperature = sampling.diversity.temperature(sampling.temperature, number)
        stream = (int(content_key(job.instruction.id)[:15], 16), number)
        rows.append([Row(job.prompt, sampling.drawn_at(temperature, (*stream, i)), ends) for i in range(sampling.k)])
    generate(model, tokenizer, [row for group in rows for row in group])
    for job, group in zip(jobs, rows, strict=True):
        job.tries.append(Try.of([_response(row, chat) for row in group], group[0].sampling.temperature))


def _response(row: Row, chat: ChatTemplate | None) -> Response:
    """A sampled response: only the answer, since training renders the template around it again."""
    total = sum(row.logprobs)
    return Response(
        text=row.text if chat is None else chat.answer_in(row.text),
        tokens=len(row.ids),
        logprob_sum=total,
        logprob_mean=total / len(row.ids) if row.ids else None,
        finish_reason=row.finish_reason,
    )


def _best(tries: Sequence[Try]) -> Try:
    return min(tries, key=lambda one: one.worst)
