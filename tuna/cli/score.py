"""`tuna score`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuna.cli.template import TemplateOption
from tuna.console.warnings import given_template, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    from tuna.data.tokenization import TokenizedGroup
    from tuna.score.scoring import ScoreReport

__all__ = ["score"]


def score(
    model: Annotated[str, typer.Option(help="smollm2-135m, tiny, a folder, or a name on the hub.")],
    data: Annotated[str, typer.Option(help="Ranked records: .json, .jsonl, .parquet or a dataset folder.")],
    template: TemplateOption = None,
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt and response together.")] = 512,
    length_penalty: Annotated[float, typer.Option(help="A score is sum(log p) / length ** this.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Use the first so many records.")] = None,
    batch: Annotated[int, typer.Option(help="Tokens a pass; a longer group gets its own.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="As torch names it. Default: a GPU if there is one.")] = None,
    backend: Annotated[str, typer.Option(help="Kernel backend; see tuna info.")] = "auto",
    format: Annotated[str, typer.Option(help="Shape of the records.")] = "auto",
    on_bad: Annotated[Literal["fail", "skip"], typer.Option(help="A record that cannot be used.")] = "fail",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    per_record_file: Annotated[
        Path | None, typer.Option("--per-record", help="Write the scores of each record to this .jsonl file.")
    ] = None,
) -> None:
    """Measure how often a model ranks responses as the data does. Nothing is trained."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from tuna.console.next import say_next
    from tuna.console.terminal import Terminal
    from tuna.data.files import write_rows
    from tuna.data.notices import cut_notice
    from tuna.data.records import read_records
    from tuna.data.tokenization import tokenize_records
    from tuna.models.loading import load_model, place_for
    from tuna.score.scoring import per_record
    from tuna.system.writing import write_json
    from tuna.train.distributed import launched
    from tuna.train.outputs import check_files

    if launched()[1] > 1:
        raise ValueError(f"tuna score runs as one process, not as {launched()[1]} ranks: start it without a launcher")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype = {dtype!r} is not one of 'float32', 'bfloat16', 'float16'")
    check_files({"json": json_file, "per_record": per_record_file}, {"data": data}, model=model)
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit} must be at least 1")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty = {length_penalty} must be finite")
    if batch < 1:
        raise ValueError(f"batch = {batch} must be at least 1")
    place = place_for(device)
    console = Terminal()
    disable_progress_bar()  # type: ignore[no-untyped-call]  # it would cut through ours
    found = read_records(data, format=format, on_bad=on_bad)
    with console.status(f"loading {model} …"):
        network, tokenizer = load_model(model, dtype=getattr(torch, dtype))
        torch.nn.Module.to(network, place)
    template = given_template(console, template, model, tokenizer)
    groups, unfit = tokenize_records(
        found.records[:limit], tokenizer, template=template, max_length=max_length, on_bad=on_bad
    )
    if not groups:
        raise ValueError(f"data = {data!r} holds no record that can be used")
    warn(console, cut_notice(groups, max_length))
    report = _score(console, network, tokenizer, groups, batch, length_penalty, backend)
    left_out = len(found.problems) + len(unfit)
    summary = {"model": model, "data": data, "template": template, **report.summary(), "left_out": left_out}
    console.print(_table(summary))
    if json_file is not None:
        write_json(json_file, summary)
    if per_record_file is not None:
        write_rows(per_record_file, per_record(groups, report.scored))
    say_next(console, "serve", model=model)


def _score(
    console: Console,
    network: Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[TokenizedGroup],
    batch: int,
    length_penalty: float,
    backend: str,
) -> ScoreReport:
    """Score ``groups`` under a bar that counts tree tokens."""
    from tuna.console.bar import progress_bar
    from tuna.score.scoring import score_dataset
    from tuna_kernels import tree_tokens

    with progress_bar(console, "tokens") as bar:
        total = int(tree_tokens([item.group for item in groups]).sum())
        task = bar.add_task("score", total=total)
        return score_dataset(
            network,
            groups,
            tokens_per_batch=batch,
            length_penalty=length_penalty,
            backend=backend,
            on_batch=lambda tokens: bar.advance(task, tokens),
            tokenizer=tokenizer,
        )


def _table(summary: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{summary['model']} on {summary['data']}", show_header=False, title_justify="left")
    table.add_row("template", summary["template"])
    table.add_row("groups", f"{summary['groups']:,} ({summary['left_out']:,} left out)")
    table.add_row("responses", f"{summary['candidates']:,}")
    for name, value in summary["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    saved = 1 - summary["tokens"] / summary["unshared_tokens"]
    table.add_row("tokens", f"{summary['tokens']:,} ({saved:.1%} saved by sharing)")
    table.add_row("seconds", f"{summary['seconds']:.1f} ({summary['tokens_per_second']:,.0f} tokens/s)")
    return table
