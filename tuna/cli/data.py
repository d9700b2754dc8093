"""`tuna data`: check, convert, split and count ranked records."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tuna.cli.options import Format, Json, MaxLength, OnBad, Template, at_least
from tuna.console.preview import best_and_worst
from tuna.console.terminal import Terminal, complain, say, say_json
from tuna.console.warnings import given_template, print_problems, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuna.data.records import Record
    from tuna.data.tokenization import TokenStats

__all__ = ["app", "record_stats"]

app = typer.Typer(help="Check, convert, split and count ranked records.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(help="A .json, .jsonl or .parquet file, or a folder saved by datasets.")]


@app.command()
def validate(
    source: Source,
    format: Format = "auto",
    show: Annotated[int, at_least(0, "Number of groups whose best and worst responses are shown.")] = 3,
    as_json: Json = False,
) -> None:
    """Read all records and report every problem; exit code 1 if there is one."""
    from tuna.console.next import say_next
    from tuna.data.records import read_records

    found = read_records(source, format=format, on_bad="skip")
    stats = record_stats(found.records)
    console = Terminal()
    if as_json:
        problems = [{"file": p.file, p.unit: p.line, "reason": p.reason} for p in found.problems]
        say_json({**stats, "problems": problems})
    else:
        print_problems(console, found.problems)
        console.print(_stats_table(stats))
        if show > 0 and found.records:
            console.print(best_and_worst(found.records, show))
    if found.problems:
        raise typer.Exit(1)
    if found.records and not as_json:
        say_next(console, "train", model="MODEL", data=source, output="FOLDER")


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="File to write: .jsonl, .json or .parquet.")],
    format: Annotated[
        str,
        typer.Option(
            help="Format of the records: tuna (prompt|messages, responses, scores|ranks), released (instruction, "
            "output, score), alpaca_eval (the same with generator), preference (prompt, chosen, rejected), "
            "ranked_answers (prompt|question, answers of {answer, rank}), or auto to detect it."
        ),
    ] = "auto",
    on_bad: OnBad = "fail",
) -> None:
    """Write records of any known format in Tuna's own: id, prompt or messages, responses, scores or ranks."""
    from tuna.console.next import next_command
    from tuna.data.records import read_records, write_records
    from tuna.train.outputs import check_files

    check_files({"target": target}, {"source": source})
    found = read_records(source, format=format, on_bad=on_bad)
    write_records(target, found.records)
    print_problems(Terminal(stderr=True), found.problems)
    say(f"{target}: {len(found.records)} records, {len(found.problems)} left out")
    complain(f"next: {next_command('train', model='MODEL', data=target, output='FOLDER')}")


@app.command()
def stats(
    context: typer.Context,
    source: Source,
    format: Format = "auto",
    model: Annotated[
        str | None, typer.Option(help="Count tokens with the tokenizer of this model, a name or a folder.")
    ] = None,
    template: Template = None,
    max_length: MaxLength = 512,
    batch_groups: Annotated[int, at_least(1, "Groups per padded batch, for comparison.")] = 16,
    on_bad: OnBad = "skip",
    as_json: Json = False,
) -> None:
    """Count groups, candidates and ties; with --model also tokens, and how many sharing saves."""
    from tuna.cli.messages import refuse_given
    from tuna.data.records import read_records

    if model is None:
        refuse_given(context, "it needs --model", "template", "max_length", "batch_groups")
    found = read_records(source, format=format, on_bad=on_bad)
    problems, tokens = list(found.problems), None
    console = Terminal(stderr=as_json)
    if model is not None and found.records:
        from tuna.data.notices import cut_notice
        from tuna.data.tokenization import token_stats, tokenize_records
        from tuna.models.loading import load_tokenizer

        tokenizer = load_tokenizer(model)
        groups, unfit = tokenize_records(
            found.records,
            tokenizer,
            template=given_template(console, template, model, tokenizer),
            max_length=max_length,
            on_bad=on_bad,
        )
        problems += unfit
        tokens = token_stats(groups, batch_groups=batch_groups) if groups else None
        warn(console, cut_notice(groups, max_length))
    numbers = record_stats(found.records)
    if as_json:
        left_out = [str(problem) for problem in problems]
        say_json({**numbers, "tokens": asdict(tokens) if tokens else None, "problems": left_out})
        return
    print_problems(console, problems)
    console.print(_stats_table(numbers))
    if tokens is not None:
        console.print(_lengths_table(tokens, max_length))
        console.print(_tokens_table(tokens))


@app.command()
def split(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A .json or .jsonl file whose rows have prompts or ids.")],
    output: Annotated[Path, typer.Option(help="Folder for train.jsonl and held_out.jsonl.")],
    fraction: Annotated[
        float | None, typer.Option(help="Fraction of the prompts to hold out, chosen by their hash.")
    ] = None,
    like: Annotated[str | None, typer.Option(help="File whose ids and prompts are held out.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of prompts.")] = 42,
) -> None:
    """Split a file by the prompts of its rows (by their ids where they have none); rows are copied as they are.

    All rows of a prompt go to the same side. The same seed and fraction hold out the same prompts in tuna train.
    """
    from tuna.cli.messages import refuse_given
    from tuna.console.next import next_command
    from tuna.data.files import write_rows
    from tuna.data.split import hold_out, rows_to_split
    from tuna.train.outputs import check_files

    check_files({"output": output / "train.jsonl"}, {"source": source, "like": like})
    check_files({"output": output / "held_out.jsonl"}, {"source": source, "like": like})
    if (fraction is None) == (like is None):
        raise ValueError("give exactly one of --fraction and --like")
    if like is not None:
        refuse_given(context, "--like decides what is held out", "seed")
    rows = rows_to_split(source)
    if like is not None:
        there = rows_to_split(like)
        ids, prompts = ({getattr(item, name) for item in there} - {None} for name in ("id", "prompt"))
        held = {item.key for item in rows if item.id in ids or item.prompt in prompts}
    else:
        held = hold_out([item.key for item in rows], fraction or 0.0, seed)
    parts = {
        "train.jsonl": [item.row for item in rows if item.key not in held],
        "held_out.jsonl": [item.row for item in rows if item.key in held],
    }
    for name, part in parts.items():
        write_rows(output / name, part)
        say(f"{output / name}: {len(part)} rows")
    files = {"data": output / "train.jsonl", "eval_data": output / "held_out.jsonl"}
    complain(f"next: {next_command('train', model='MODEL', **files, output='FOLDER')}")


def record_stats(records: Sequence[Record]) -> dict[str, Any]:
    """Counts that need no tokenizer, as plain JSON values.

    `tied_records` have two responses of equal rank, `unranked_records` have no two of different rank (k = 1
    among them), `duplicate_responses` and `empty_responses` count responses.
    """
    levels = [max(record.dense_ranks()) + 1 for record in records]
    sizes = [len(record.responses) for record in records]
    lengths = sorted(len(response) for record in records for response in record.responses)
    return {
        "records": len(records),
        "responses": sum(sizes),
        "responses_per_record": {str(k): n for k, n in sorted(Counter(sizes).items())},
        "tied_records": sum(level < size for level, size in zip(levels, sizes, strict=True)),
        "unranked_records": sum(level == 1 for level in levels),
        "duplicate_responses": sum(len(record.responses) - len(set(record.responses)) for record in records),
        "empty_responses": sum(not response.strip() for record in records for response in record.responses),
        "median_response_characters": lengths[len(lengths) // 2] if lengths else 0,
    }


def _stats_table(numbers: dict[str, Any]) -> Table:
    table = Table(title="Records", show_header=False, title_justify="left")
    for key, value in numbers.items():
        shown = ", ".join(f"{k}: {n}" for k, n in value.items()) if isinstance(value, dict) else f"{value:,}"
        table.add_row(key.replace("_", " "), shown)
    return table


def _lengths_table(tokens: TokenStats, max_length: int) -> Table:
    table = Table(title=f"Tokens, {tokens.groups:,} groups, limit {max_length}", title_justify="left")
    table.add_column("quantile")
    for quantile in tokens.prompt_tokens:
        table.add_column(quantile, justify="right")
    table.add_row("prompt", *(f"{n:,}" for n in tokens.prompt_tokens.values()))
    table.add_row("response", *(f"{n:,}" for n in tokens.response_tokens.values()))
    table.caption = f"{tokens.cut_responses / tokens.candidates:.1%} of the responses are cut"
    return table


def _tokens_table(tokens: TokenStats) -> Table:
    table = Table(title="Tokens to compute", title_justify="left")
    table.add_column("how")
    table.add_column("tokens", justify="right")
    table.add_column("of padded", justify="right")
    ways = {
        f"k padded copies, {tokens.batch_groups} groups a batch": tokens.padded,
        "k copies, no padding": tokens.unpadded,
        "prompt once": tokens.prompt_shared,
        "prefix tree": tokens.tree,
    }
    for name, count in ways.items():
        table.add_row(name, f"{count:,}", f"{count / tokens.padded:.1%}")
    saved = tokens.unpadded - tokens.tree
    table.caption = f"the tree saves {saved:,} tokens ({saved / tokens.unpadded:.1%}) over copies without padding"
    return table
