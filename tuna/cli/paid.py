"""What commands that pay for calls have in common: their flags, the bar, the summary and the exit code.

Exit codes: 0 all done, 1 some set aside (`failed.jsonl`), 3 ended early (budget, refusal, Ctrl-C); 2 is a user error as
everywhere.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from tuna.cli.flags import Flags

if TYPE_CHECKING:
    from rich.console import Console

    from tuna.gather.api.calls import Outcome, PaidCalls, PaidSettings, Request
    from tuna.gather.api.journal import Journal

__all__ = ["BaseUrl", "DryRun", "Endpoint", "Extra", "Limits", "PaidRun", "Prices", "paid_settings", "parse_extra"]

SHOWN = 5  # notes about a journal that are printed
J = TypeVar("J")
R = TypeVar("R")

ENDPOINT = "tuna.gather.api.settings:EndpointSettings"
BaseUrl: TypeAlias = Annotated[dict[str, Any], Flags(ENDPOINT, "base_url", variables={"base_url": "OPENAI_BASE_URL"})]
Endpoint: TypeAlias = Annotated[
    dict[str, Any],
    Flags(
        ENDPOINT,
        "api-key-env=key_variable requests_per_minute request_timeout total_timeout max_attempts backoff max_backoff",
    ),
]
Limits: TypeAlias = Annotated[
    dict[str, Any], Flags("tuna.gather.api.calls:PaidSettings", "concurrency max_calls max_cost")
]
Prices: TypeAlias = Annotated[dict[str, Any], Flags("tuna.gather.api.budget:Prices", "input output", prefix="price_")]
DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Print an estimate of calls, tokens and cost; send no request.")
]
Extra: TypeAlias = Annotated[
    str | None,
    typer.Option(help="""Extra fields of each request as JSON, such as '{"top_k": 40}'; null removes a field."""),
]


def paid_settings(
    endpoint: dict[str, Any], limits: dict[str, Any], prices: dict[str, Any], **base_url: Any
) -> PaidSettings:
    """The flags above as settings.

    Raises:
        ValueError: a value outside its range.
    """
    from tuna.gather.api.budget import Prices
    from tuna.gather.api.calls import PaidSettings
    from tuna.gather.api.settings import EndpointSettings

    return PaidSettings(EndpointSettings(**base_url, **endpoint), **limits, prices=Prices(**prices))


def parse_extra(text: str | None) -> dict[str, Any]:
    """The fields of `--extra`.

    Raises:
        ValueError: no JSON object.
    """
    from tuna.gather.api.bodies import parse_json

    try:
        value = parse_json(text.encode("utf-8", "replace")) if text else {}
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"--extra is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--extra takes a JSON object, not {text}")
    return value


@dataclass
class PaidRun:
    """One command at work in its folder.

    Attributes:
        console: of the user.
        tool: "generate", "judge", …
        folder: holds the journal, the manifest and the results.
        parameters: decide what an answer means; the folder takes one set of them.
        settings: how to ask and what to spend.
        following: the command that usually comes next, once there are results.
    """

    console: Console
    tool: str
    folder: Path
    parameters: Mapping[str, Any]
    settings: PaidSettings
    following: str = ""

    def journal(self) -> Journal:
        """The folder's journal, to be opened.

        Raises:
            ValueError: no call could succeed for want of a key.
        """
        from tuna.gather.api.remedies import needs_key

        if (reason := needs_key(self.settings.endpoint)) is not None:
            raise ValueError(reason)
        return self._journal()

    def _journal(self) -> Journal:
        from tuna.gather.api.journal import Journal

        return Journal(self.folder, self.tool, {"base_url": self.settings.endpoint.base_url, **self.parameters})

    def dry_run(self, requests: Iterable[Request], note: str) -> None:
        """Print what the requests would take at most; calls nothing and writes nothing."""
        from rich.table import Table

        from tuna.gather.api.calls import worst_case

        if (self.folder / "manifest.json").exists():
            with self._journal() as journal:
                calls, found, usage = worst_case(requests, journal)
        else:
            calls, found, usage = worst_case(requests)
        prices = self.settings.prices
        table = Table(title=f"tuna {self.tool}: dry run", show_header=False, title_justify="left", caption=note)
        table.add_row("calls", f"{calls:,}")
        table.add_row("answered by the journal", f"{found:,}")
        table.add_row("prompt tokens (estimate)", f"{usage.input:,}")
        table.add_row("response tokens (at most)", f"{usage.output:,}")
        cost = (
            f"{prices.cost(usage):,.4f}"
            if prices.input or prices.output
            else "unknown: give --price-input and --price-output"
        )
        table.add_row("cost (at most)", cost)
        self.console.print(table)

    def run(
        self,
        journal: Journal,
        jobs: Sequence[J],
        work: Callable[[PaidCalls, J], Awaitable[R]],
        *,
        prepare: Callable[[PaidCalls], Awaitable[None]] | None = None,
    ) -> tuple[Outcome[R], dict[str, Any]]:
        """Work through the jobs under a bar; the outcome, and the figures of the run."""
        from rich.progress import TextColumn

        from tuna.console.bar import progress_bar
        from tuna.gather.api.calls import run_paid

        for note in journal.notes[:SHOWN]:
            self._say(note, "yellow")
        if len(journal.notes) > SHOWN:
            self._say(f"… and {len(journal.notes) - SHOWN} lines more", "yellow")
        start = time.perf_counter()
        with progress_bar(self.console, "records", TextColumn("{task.fields[spent]}", markup=False)) as bar:
            task = bar.add_task(self.tool, total=len(jobs), spent="")
            outcome, calls = asyncio.run(
                run_paid(
                    journal,
                    self.settings,
                    jobs,
                    work,
                    prepare=prepare,
                    on_done=lambda calls: bar.update(task, advance=1, spent=_spent(calls)),
                )
            )
        return outcome, _figures(outcome, calls, len(jobs), time.perf_counter() - start)

    def finish(self, jobs: Sequence[Any], outcome: Outcome[Any], figures: dict[str, Any]) -> None:
        """Write `failed.jsonl` and `summary.json`, print the summary, and leave with the exit code.

        Raises:
            typer.Exit: something was set aside, or the run ended early.
        """
        from tuna.data.files import write_rows
        from tuna.system.writing import write_json

        failed = self.folder / "failed.jsonl"
        if outcome.failed:
            rows = [
                {"id": jobs[i].id, "reason": reason, "record": jobs[i].model_dump(exclude_none=True)}
                for i, reason in sorted(outcome.failed.items())
            ]
            write_rows(failed, rows)
        else:
            failed.unlink(missing_ok=True)
        write_json(self.folder / "summary.json", figures)
        self.console.print(_table(f"tuna {self.tool}: {self.folder}", figures))
        if outcome.failed:
            first = outcome.failed[min(outcome.failed)]
            self._say(f"{len(outcome.failed)} set aside in {failed}; the first: {first}", "yellow")
        if outcome.stopped is not None:
            left = figures["left"]
            self._say(f"ended early, {left} left: {outcome.stopped}. The same command resumes the run.", "red")
            raise typer.Exit(3)
        if self.following:
            self.console.print(f"next: {self.following}", markup=False, highlight=False, soft_wrap=True)
        if outcome.failed:
            raise typer.Exit(1)

    def _say(self, text: str, style: str) -> None:
        from rich.text import Text

        self.console.print(Text(text, style=style), soft_wrap=True)


def _spent(calls: PaidCalls) -> str:
    budget = calls.budget
    tokens = f"{budget.spent.input + budget.spent.output:,} tokens"
    return f"{tokens}, cost {budget.cost:.4g}" if budget.cost else tokens


def _figures(outcome: Outcome[Any], calls: PaidCalls, jobs: int, seconds: float) -> dict[str, Any]:
    journal, endpoint, budget = calls.journal, calls.endpoint, calls.budget
    done, failed = len(outcome.results), len(outcome.failed)
    return {
        "done": done,
        "set aside": failed,
        "left": jobs - done - failed,
        "calls answered": calls.made,
        "answered by the journal": calls.found,
        "passed over in the journal": calls.passed_over + len(journal.notes),
        "requests sent": endpoint.requests,
        "repeated after a fault": endpoint.retries,
        "refused for their rate": endpoint.refused,
        "seconds waited": round(endpoint.waited, 3),
        "seconds": round(seconds, 3),
        "calls of all runs": budget.calls,
        "of them without use": journal.lost,
        "prompt tokens of all runs": budget.spent.input,
        "response tokens of all runs": budget.spent.output,
        "cost of all runs": budget.cost,
        "stopped": None if outcome.stopped is None else str(outcome.stopped),
    }


def _table(title: str, figures: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in figures.items():
        if value is not None:
            table.add_row(name, value if isinstance(value, str) else f"{value:,}")
    return table
