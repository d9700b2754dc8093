"""`tuna generate`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuna.cli import paid
from tuna.console.warnings import print_problems

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tuna.data.instructions import Instruction
    from tuna.gather.responses import ResponseSet
    from tuna.gather.teacher import Sampling

__all__ = ["generate", "read_wanted"]


def generate(
    context: typer.Context,
    instructions: Annotated[
        str,
        typer.Option(
            help="File of instructions: prompt, messages, instruction (and input), self-instruct seed tasks or "
            "Vicuna questions; .json, .jsonl or .parquet."
        ),
    ],
    model: Annotated[str, typer.Option(help="Name of the teacher at the endpoint.")],
    output: Annotated[Path, typer.Option(help="Folder of the run: responses.jsonl, journal, manifest.")],
    api: Annotated[Literal["completions", "chat"], typer.Option(help="Kind of endpoint.")] = "chat",
    n: Annotated[int, typer.Option("--n", help="Responses a prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a response.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Passed on to the endpoint.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a response; may be repeated.")] = None,
    template: Annotated[str, typer.Option(help="For completions: none, alpaca or a text with {prompt}.")] = "none",
    system: Annotated[str | None, typer.Option(help="For chat: a system message.")] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs/--no-logprobs", help="Insist on log-probabilities, or do without.")
    ] = True,
    keep_token_logprobs: Annotated[
        bool, typer.Option("--keep-token-logprobs", help="Write those of each token, not only sum and mean.")
    ] = False,
    score_with: Annotated[
        str | None, typer.Option(help="Take the log-probabilities from this local model instead of the endpoint.")
    ] = None,
    score_template: Annotated[
        str | None,
        typer.Option(
            help="How prompts are shown to it. Default: as it was trained; else chat for chat, or the template."
        ),
    ] = None,
    score_max_length: Annotated[int, typer.Option(help="Most tokens it scores of prompt and response.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Use the first so many instructions.")] = None,
    on_bad: Annotated[Literal["fail", "skip"], typer.Option(help="An instruction that cannot be used.")] = "fail",
    extra: paid.Extra = None,
    base_url: paid.BaseUrl = "https://api.openai.com/v1",
    key_variable: paid.KeyVariable = "OPENAI_API_KEY",
    concurrency: paid.Concurrency = 8,
    requests_per_minute: paid.RequestsPerMinute = None,
    request_timeout: paid.RequestTimeout = 120.0,
    total_timeout: paid.TotalTimeout = 900.0,
    max_attempts: paid.MaxAttempts = 6,
    backoff: paid.Backoff = 1.0,
    max_backoff: paid.MaxBackoff = 60.0,
    max_calls: paid.MaxCalls = None,
    max_cost: paid.MaxCost = None,
    price_input: paid.PriceInput = 0.0,
    price_output: paid.PriceOutput = 0.0,
    dry_run: paid.DryRun = False,
) -> None:
    """Draw responses from a teacher endpoint, with their log-probabilities. Interrupted, it goes on where it was."""
    from tuna.cli.messages import refuse_given
    from tuna.console.terminal import Terminal
    from tuna.data.templates import saved_template
    from tuna.gather.teacher import Sampling
    from tuna.train.outputs import check_files

    if score_with is None:
        refuse_given(context, "it is for --score-with", "score_template", "score_max_length")
    if score_with is None and not logprobs:
        refuse_given(context, "no log-probabilities are asked for", "keep_token_logprobs")
    settings = paid.paid_settings(
        base_url=base_url,
        key_variable=key_variable,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        request_timeout=request_timeout,
        total_timeout=total_timeout,
        max_attempts=max_attempts,
        backoff=backoff,
        max_backoff=max_backoff,
        max_calls=max_calls,
        max_cost=max_cost,
        price_input=price_input,
        price_output=price_output,
    )
    sampling = Sampling(
        model=model,
        api=api,
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        template=template,
        system=system,
        logprobs=logprobs and score_with is None,
        extra=paid.parse_extra(extra),
    )
    check_files({"output": output / "responses.jsonl"}, {"instructions": instructions})
    run = paid.PaidRun(Terminal(), "generate", output, sampling.parameters(), settings)
    wanted = read_wanted(run.console, instructions, limit, on_bad)
    requests = [sampling.request(item) for item in wanted]  # what cannot be rendered shows before the first call
    if dry_run:
        probe = [sampling.probe()] if sampling.logprobs else []
        run.dry_run([*probe, *requests], "an endpoint that ignores n takes up to n calls a prompt")
        return
    scorer = None
    if score_with is not None:
        shown = score_template or saved_template(score_with) or ("chat" if api == "chat" else template)
        scorer = _Scorer(run.console, score_with, shown, score_max_length)
        scorer.check(wanted)
    _gather(run, sampling, wanted, keep_token_logprobs, scorer)


def read_wanted(
    console: Console, source: str, limit: int | None, on_bad: Literal["fail", "skip"]
) -> Sequence[Instruction]:
    """The first ``limit`` instructions of a file; what is left out is said.

    Raises:
        ValueError: ``limit`` below 1, no instruction that can be used, and what `read_instructions` raises.
    """
    from tuna.data.instructions import read_instructions

    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit} must be at least 1")
    found, problems = read_instructions(source, on_bad=on_bad)
    print_problems(console, problems)
    if not found:
        raise ValueError(f"instructions = {source!r} holds no instruction that can be used")
    return found[:limit]


def _gather(
    run: paid.PaidRun,
    sampling: Sampling,
    wanted: Sequence[Instruction],
    keep_token_logprobs: bool,
    scorer: _Scorer | None,
) -> None:
    from tuna.console.next import next_command
    from tuna.gather.responses import write_responses
    from tuna.gather.teacher import generate_responses, probe_logprobs

    with run.journal() as journal:
        outcome, figures = run.run(
            journal,
            wanted,
            lambda calls, item: generate_responses(calls, sampling, item, keep_logprobs=keep_token_logprobs),
            prepare=functools.partial(probe_logprobs, sampling=sampling) if sampling.logprobs else None,
        )
        sets = [outcome.results[index] for index in sorted(outcome.results)]
        if scorer is not None:
            sets = scorer.score(sets)
        if sets:
            write_responses(run.folder / "responses.jsonl", sets)
            ranking = "judge" if scorer is None and not sampling.logprobs else "rank"
            run.following = next_command(ranking, data=run.folder / "responses.jsonl", output="FOLDER")
        run.finish(wanted, outcome, figures)


class _Scorer:
    """A local model that scores what the endpoint wrote."""

    def __init__(self, console: Console, name: str, template: str, max_length: int) -> None:
        import torch

        from tuna.models.loading import load_model, place_for

        self.console, self.name, self.template, self.max_length = console, name, template, max_length
        with console.status(f"loading {name} …"):
            self.model, self.tokenizer = load_model(name)
            torch.nn.Module.to(self.model, place_for())

    def check(self, wanted: Sequence[Instruction]) -> None:
        """Refuse, before anything is paid, prompts that could not be scored."""
        from tuna.data.records import Record
        from tuna.data.tokenization import tokenize_records

        records = [Record(id=x.id, prompt=x.prompt, messages=x.messages, responses=["."]) for x in wanted]
        tokenize_records(records, self.tokenizer, template=self.template, max_length=self.max_length)

    def score(self, sets: list[ResponseSet]) -> list[ResponseSet]:
        """The sets with this model's log-probabilities."""
        from tuna.gather.local_scores import score_responses

        arguments: dict[str, Any] = {"name": self.name, "template": self.template, "max_length": self.max_length}
        with self.console.status(f"scoring with {self.name} …"):
            return score_responses(sets, self.model, self.tokenizer, **arguments)
