"""`tuna rank`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna.cli.flags import Flags
from tuna.cli.options import Dtype, JsonFile, MaxLength, OnBad, Template
from tuna.console.warnings import given_template

if TYPE_CHECKING:
    from rich.console import Console

    from tuna.gather.responses import ResponseSet

__all__ = ["rank"]


def rank(
    context: typer.Context,
    data: Annotated[
        str, typer.Option(help="Responses: the output of tuna generate or tuna sample, or any file of responses.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for ranked.jsonl, or the .jsonl or .json file to write.")],
    rules: Annotated[
        dict[str, Any],
        Flags("tuna.gather.likelihood:RankingRules", "length_penalty min_tokens truncated tie min_responses"),
    ],
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Rank the dataset's own response first.")
    ] = True,
    score_with: Annotated[
        str | None,
        typer.Option(help="Local model for the log-probabilities; takes --template, --max-length, --dtype."),
    ] = None,
    template: Template = None,
    max_length: MaxLength = 2048,
    dtype: Dtype = "float32",
    on_bad: OnBad = "fail",
    json_file: JsonFile = None,
) -> None:
    """Rank responses by their log-probability under the teacher, the reference response first."""
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
    checked = RankingRules(**rules)
    if score_with is None:
        refuse_given(context, "it needs --score-with", "template", "max_length", "dtype")
    console = Terminal()
    sets, problems = read_responses(data, on_bad=on_bad)
    if not sets:
        raise ValueError(f"data = {data!r} has no responses")
    if not reference:
        sets = [item.model_copy(update={"reference": None}) for item in sets]
    if score_with is not None:
        sets = _scored(console, sets, score_with, template, max_length, dtype)
    ranked, too_few = rank_responses(sets, checked)
    if not ranked:
        raise ValueError(
            f"no record of {data} has min_responses = {checked.min_responses} responses left; see tuna rank --help"
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
