"""`tuna judge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tuna.cli import paid
from tuna.console.warnings import print_problems

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuna.gather.judge import Candidates, Judge

__all__ = ["judge"]


def judge(
    data: Annotated[
        str, typer.Option(help="Responses to rank: what tuna generate or tuna sample wrote, or ranked records.")
    ],
    model: Annotated[str, typer.Option(help="Name of the judge at the endpoint.")],
    output: Annotated[Path, typer.Option(help="Folder of the run: records.jsonl, details.jsonl, journal, manifest.")],
    orders: Annotated[int, typer.Option(help="2: show the candidates in two orders and average.")] = 1,
    tries: Annotated[int, typer.Option(help="Times to ask until an answer can be read.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the orders in which candidates are shown.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the judge.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a judgement.")] = 2048,
    reference_candidate: Annotated[
        bool, typer.Option("--reference-candidate", help="Add the judge's own answer as the best response.")
    ] = False,
    response_format: Annotated[
        Literal["json_schema", "json_object", "text"],
        typer.Option(help="Form to ask for; where the endpoint refuses it, the next simpler one is taken."),
    ] = "json_schema",
    limit: Annotated[int | None, typer.Option(help="Use the first so many records.")] = None,
    on_bad: Annotated[Literal["fail", "skip"], typer.Option(help="A record that cannot be used.")] = "fail",
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
    """Let a judge model rank responses; writes records for tuna train. Interrupted, it goes on where it was."""
    from tuna.console.terminal import Terminal
    from tuna.gather.judge import Judge, JudgeSettings
    from tuna.train.outputs import check_files

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
    asked = JudgeSettings(
        model=model,
        orders=orders,
        tries=tries,
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
        reference_candidate=reference_candidate,
        response_format=response_format,
        extra=paid.parse_extra(extra),
    )
    check_files({"output": output / "records.jsonl"}, {"data": data})
    check_files({"output": output / "details.jsonl"}, {"data": data})
    run = paid.PaidRun(Terminal(), "judge", output, asked.parameters(), settings)
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit} must be at least 1")
    items = _candidates(run, data, on_bad)[:limit]
    examiner = Judge(asked)
    if dry_run:
        requests = [request for item in items for request in examiner.requests(item)]
        run.dry_run(requests, f"an answer that cannot be read is asked for again, up to {tries} times in all")
        return
    _judge(run, examiner, items)


def _candidates(run: paid.PaidRun, source: str, on_bad: Literal["fail", "skip"]) -> Sequence[Candidates]:
    """Response sets or records; what order they have is not looked at."""
    from tuna.data.files import open_rows
    from tuna.data.records import read_records
    from tuna.gather.judge import Candidates
    from tuna.gather.responses import read_responses

    first = next((row for _, row in open_rows(source).items if isinstance(row, dict)), {})
    given = first.get("responses")
    ranked = isinstance(given, list) and any(isinstance(item, dict) and "rank" in item for item in given)
    if given is not None and not ranked and "scores" not in first and "ranks" not in first:
        sets, problems = read_responses(source, on_bad=on_bad)
        items = [
            Candidates(id=x.id, prompt=x.prompt, messages=x.messages, responses=[r.text for r in x.responses])
            for x in sets
        ]
    else:
        found = read_records(source, on_bad=on_bad)
        problems = found.problems
        items = [
            Candidates(id=x.id, prompt=x.prompt, messages=x.messages, responses=list(x.responses))
            for x in found.records
        ]
    print_problems(run.console, problems)
    if not items:
        raise ValueError(f"data = {source!r} holds no record that can be used")
    return items


def _judge(run: paid.PaidRun, examiner: Judge, items: Sequence[Candidates]) -> None:
    from tuna.console.next import next_command
    from tuna.data.files import write_rows
    from tuna.data.records import write_records

    with run.journal() as journal:
        outcome, figures = run.run(journal, items, examiner.judge)
        verdicts = [outcome.results[index] for index in sorted(outcome.results)]
        if verdicts:
            write_records(run.folder / "records.jsonl", [verdict.record for verdict in verdicts])
            write_rows(run.folder / "details.jsonl", (verdict.details for verdict in verdicts))
            run.following = next_command("train", model="MODEL", data=run.folder / "records.jsonl", output="FOLDER")
        unparsable = run.folder / "unparsable.jsonl"
        rows = [{"id": x.id, "answers": examiner.unparsable[x.id]} for x in items if x.id in examiner.unparsable]
        if rows:
            write_rows(unparsable, rows)
        else:
            unparsable.unlink(missing_ok=True)
        figures |= {
            "answers that could not be read": examiner.unread,
            "form of the answers": examiner.format,
            "open-ended": sum(verdict.details.get("kind") == "open" for verdict in verdicts),
            "close-ended": sum(verdict.details.get("kind") == "closed" for verdict in verdicts),
        }
        run.finish(items, outcome, figures)
