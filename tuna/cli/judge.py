"""`tuna judge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuna.cli import paid
from tuna.cli.flags import Flags
from tuna.cli.options import Limit, OnBad
from tuna.console.warnings import print_problems

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuna.gather.judge import Candidates, Judge

__all__ = ["judge"]


def judge(
    *,
    data: Annotated[
        str, typer.Option(help="Responses to rank: the output of tuna generate or tuna sample, or ranked records.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for records.jsonl, details.jsonl, the journal and the manifest.")
    ],
    asked: Annotated[
        dict[str, Any],
        Flags(
            "tuna.gather.judge:JudgeSettings",
            "model orders tries seed temperature max_tokens reference_candidate response_format",
        ),
    ],
    limit: Limit = None,
    on_bad: OnBad = "fail",
    extra: paid.Extra = None,
    base_url: paid.BaseUrl,
    endpoint: paid.Endpoint,
    limits: paid.Limits,
    prices: paid.Prices,
    dry_run: paid.DryRun = False,
) -> None:
    """Let a judge model rank responses and write records for tuna train; the same command resumes a run."""
    from tuna.console.terminal import Terminal
    from tuna.gather.judge import Judge, JudgeSettings
    from tuna.train.outputs import check_files

    settings = paid.paid_settings(endpoint, limits, prices, **base_url)
    questions = JudgeSettings(**asked, extra=paid.parse_extra(extra))
    check_files({"output": output / "records.jsonl"}, {"data": data})
    check_files({"output": output / "details.jsonl"}, {"data": data})
    run = paid.PaidRun(Terminal(), "judge", output, questions.parameters(), settings)
    items = _candidates(run, data, on_bad)[:limit]
    examiner = Judge(questions)
    if dry_run:
        requests = [request for item in items for request in examiner.requests(item)]
        run.dry_run(requests, f"an unreadable answer is requested again, up to {questions.tries} times in all")
        return
    _judge(run, examiner, items)


def _candidates(run: paid.PaidRun, source: str, on_bad: Literal["fail", "skip"]) -> Sequence[Candidates]:
    """Response sets or records; their order is ignored."""
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
        raise ValueError(f"data = {source!r} has no usable record")
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
