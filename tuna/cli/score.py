"""`tuna score`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna.cli.options import Data, Device, Dtype, Format, JsonFile, Limit, MaxLength, Model, OnBad, Template, at_least
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
    model: Model,
    data: Data,
    template: Template = None,
    max_length: MaxLength = 512,
    length_penalty: Annotated[
        float, typer.Option(help="Exponent of the length in a score, sum(log p) / length ** length_penalty.")
    ] = 1.0,
    limit: Limit = None,
    batch: Annotated[int, at_least(1, "Tokens per batch; a longer group is a batch of its own.")] = 4096,
    dtype: Dtype = "float32",
    device: Device = None,
    backend: Annotated[str, typer.Option(help="Kernel backend; tuna info lists the usable ones.")] = "auto",
    format: Format = "auto",
    on_bad: OnBad = "fail",
    json_file: JsonFile = None,
    per_record_file: Annotated[
        Path | None, typer.Option("--per-record", help="Write the scores of each record to this .jsonl file.")
    ] = None,
) -> None:
    """Measure how often a model ranks responses as the data does, without training."""
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
    check_files({"json": json_file, "per_record": per_record_file}, {"data": data}, model=model)
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty = {length_penalty} must be finite")
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
        raise ValueError(f"data = {data!r} has no usable record")
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
    """Score `groups` under a bar that counts tree tokens."""
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
