"""`tuna generate`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuna.cli import paid
from tuna.cli.flags import Flags
from tuna.cli.options import Limit, OnBad, at_least
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
    *,
    instructions: Annotated[
        str,
        typer.Option(
            help="Instructions in .json, .jsonl or .parquet: prompts, messages, self-instruct tasks, Vicuna questions."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for responses.jsonl, the journal and the manifest.")],
    asked: Annotated[
        dict[str, Any],
        Flags(
            "tuna.gather.teacher:Sampling",
            "model api n max_tokens temperature top_p seed stop template system logprobs",
        ),
    ],
    keep_token_logprobs: Annotated[
        bool, typer.Option("--keep-token-logprobs", help="Write the log-probability of each token as well.")
    ] = False,
    score_with: Annotated[
        str | None, typer.Option(help="Local model that computes the log-probabilities instead of the endpoint.")
    ] = None,
    score_template: Annotated[
        str | None,
        typer.Option(help="Prompt template for --score-with; without it, the one saved with the model or the same."),
    ] = None,
    score_max_length: Annotated[
        int,
        at_least(2, "Maximum length of prompt plus response for --score-with, in tokens."),
    ] = 2048,
    limit: Limit = None,
    on_bad: OnBad = "fail",
    extra: paid.Extra = None,
    base_url: paid.BaseUrl,
    endpoint: paid.Endpoint,
    limits: paid.Limits,
    prices: paid.Prices,
    dry_run: paid.DryRun = False,
) -> None:
    """Generate responses at a teacher endpoint, with their log-probabilities; the same command resumes a run."""
    from tuna.cli.messages import refuse_given
    from tuna.console.terminal import Terminal
    from tuna.data.templates import saved_template
    from tuna.gather.teacher import Sampling
    from tuna.train.outputs import check_files

    if score_with is None:
        refuse_given(context, "it needs --score-with", "score_template", "score_max_length")
    if score_with is None and not asked["logprobs"]:
        refuse_given(context, "log-probabilities are off", "keep_token_logprobs")
    settings = paid.paid_settings(endpoint, limits, prices, **base_url)
    asked["logprobs"] = asked["logprobs"] and score_with is None
    sampling = Sampling(**asked, extra=paid.parse_extra(extra))
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
        shown = (
            score_template or saved_template(score_with) or ("chat" if sampling.api == "chat" else sampling.template)
        )
        scorer = _Scorer(run.console, score_with, shown, score_max_length)
        scorer.check(wanted)
    _gather(run, sampling, wanted, keep_token_logprobs, scorer)


def read_wanted(
    console: Console, source: str, limit: int | None, on_bad: Literal["fail", "skip"]
) -> Sequence[Instruction]:
    """The first `limit` instructions of a file; prints which are left out.

    Raises:
        ValueError: no usable instruction, and what `read_instructions` raises.
    """
    from tuna.data.instructions import read_instructions

    found, problems = read_instructions(source, on_bad=on_bad)
    print_problems(console, problems)
    if not found:
        raise ValueError(f"instructions = {source!r} has no usable instruction")
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
        """Refuse prompts that could not be scored before any call is paid for."""
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
