"""`tuna rank`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuna.cli.template import TemplateOption
from tuna.console.warnings import given_template

if TYPE_CHECKING:
    from rich.console import Console

    from tuna.gather.responses import ResponseSet

__all__ = ["rank"]


def rank(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="Responses: what tuna generate or tuna sample wrote, or any file of them.")],
    output: Annotated[
        Path, typer.Option(help="Folder for ranked.jsonl, the records for tuna train; or a .jsonl or .json file.")
    ],
    length_penalty: Annotated[float, typer.Option(help="A score is sum(log p) / tokens ** this.")] = 1.0,
    min_tokens: Annotated[int, typer.Option(help="Shorter responses are left out.")] = 1,
    truncated: Annotated[
        Literal["drop", "last", "keep"], typer.Option(help="Responses that were cut: left out, ranked last, or kept.")
    ] = "drop",
    tie: Annotated[float, typer.Option(help="Scores this close are tied.")] = 0.0,
    min_responses: Annotated[int, typer.Option(help="Records with fewer responses left are left out.")] = 2,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Whether the dataset's own response takes rank 0.")
    ] = True,
    score_with: Annotated[str | None, typer.Option(help="Score with this local model instead of the file's.")] = None,
    template: TemplateOption = None,
    max_length: Annotated[int, typer.Option(help="For --score-with: most tokens of prompt and response.")] = 2048,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="For --score-with: of the weights.")
    ] = "float32",
    on_bad: Annotated[Literal["fail", "skip"], typer.Option(help="A record that cannot be used.")] = "fail",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Rank responses by the log-probability their teacher gave them, the reference response first."""
    from rich.table import Table

    from tuna.cli.messages import refuse_given
    from tuna.console.next import say_next
    from tuna.console.terminal import Terminal
    from tuna.data.files import write_rows
    from tuna.gather.likelihood import RankingRules, rank_responses, ranking_figures
    from tuna.gather.responses import read_responses
    from tuna.system.writing import write_json
    from tuna.train.outputs import check_files

    check_files({"output": output, "json": json_file}, {"data": data})
    rules = RankingRules(
        length_penalty=length_penalty, min_tokens=min_tokens, truncated=truncated, tie=tie, min_responses=min_responses
    )
    if score_with is None:
        refuse_given(context, "it is for --score-with", "template", "max_length", "dtype")
    console = Terminal()
    sets, problems = read_responses(data, on_bad=on_bad)
    if not sets:
        raise ValueError(f"data = {data!r} holds no responses")
    if not reference:
        sets = [item.model_copy(update={"reference": None}) for item in sets]
    if score_with is not None:
        sets = _scored(console, sets, score_with, template, max_length, dtype)
    ranked, too_few = rank_responses(sets, rules)
    if not ranked:
        raise ValueError(
            f"no record of {data} has min_responses = {min_responses} responses left; see tuna rank --help"
        )
    target = output if output.suffix and not output.is_dir() else output / "ranked.jsonl"
    write_rows(target, (found.row() for found in ranked))
    figures = {"data": data, **ranking_figures(ranked, too_few), "unreadable": len(problems)}
    table = Table(title=f"{data} ranked", show_header=False, title_justify="left")
    for name, value in _flat(figures).items():
        table.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    if json_file is not None:
        write_json(json_file, figures)
    say_next(console, "train", model="MODEL", data=target, output="FOLDER")


def _scored(
    console: Console, sets: list[ResponseSet], name: str, template: str | None, max_length: int, dtype: str
) -> list[ResponseSet]:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from tuna.gather.local_scores import score_responses
    from tuna.models.loading import load_model, place_for

    disable_progress_bar()  # type: ignore[no-untyped-call]
    with console.status(f"scoring with {name} …"):
        model, tokenizer = load_model(name, dtype=getattr(torch, dtype))
        torch.nn.Module.to(model, place_for())
        template = given_template(console, template, name, tokenizer)
        return score_responses(sets, model, tokenizer, name=name, template=template, max_length=max_length)


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            flat |= {f"{name}: {key}": item for key, item in value.items()}
        elif name != "data":
            flat[name] = value
    return flat
