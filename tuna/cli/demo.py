"""`tuna demo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

__all__ = ["demo"]


def demo(
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny random model instead of SmolLM2-135M.")] = False,
    data: Annotated[str | None, typer.Option(help="Ranked records. Default: the examples shipped.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    groups: Annotated[int | None, typer.Option(help="Groups a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of the loss: paper or released.")] = None,
    template: Annotated[str | None, typer.Option(help="none, chat, alpaca or a text with {prompt}.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of prompt and response.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many records.")] = None,
    seed: Annotated[int, typer.Option(help="Of the hold-out, the batches and the order of training.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads. Default: what torch takes.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("runs/demo"),
) -> None:
    """Train on ranked responses, with our step beside the baseline's.

    Shows, on the CPU: that losses and gradients agree, what a step takes in time, memory and tokens both ways, and how
    well held-out responses are ranked before and after some tens of steps.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from tuna.cli.info import collect_info
    from tuna.compare.demo import DemoSettings, run_demo
    from tuna.console.next import say_next
    from tuna.console.terminal import Terminal
    from tuna.train.progress import TrainingProgress

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads = {threads} must be at least 1")
        torch.set_num_threads(threads)
    if preset not in (None, "paper", "released"):
        raise ValueError(f"preset = {preset!r} is not one of 'paper', 'released'")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # it would cut through ours
    given = {
        "data": data,
        "steps": steps,
        "groups": groups,
        "learning_rate": lr,
        "preset": preset,
        "template": template,
        "max_length": max_length,
        "limit": limit,
        "seed": seed,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = DemoSettings.tiny(**changes) if tiny else DemoSettings(**changes)
    console = Terminal()
    results = run_demo(
        settings,
        output,
        callbacks=[TrainingProgress(console)],
        say=lambda line: console.print(f"{line} …", style="dim", highlight=False),
        machine=collect_info(),
    )
    for table in demo_tables(results):
        console.print(table)
    console.print(f"{results['seconds']:.0f} s in all; demo.json and demo.png are in {output}", highlight=False)
    say_next(console, "train", model=settings.model, data="DATA", output="FOLDER")


def demo_tables(results: dict[str, Any]) -> list[Any]:
    """Agreement, costs and held-out figures as tables for the terminal."""
    return [_agreement(results["agreement"]), _costs(results["costs"]), _learned(results["training"])]


def _agreement(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    pairs = {"tuna_to_exact": "Tuna", "baseline_to_exact": "baseline", "tuna_to_baseline": "Tuna to baseline"}
    table = Table("preset", "float32", "loss", "all gradients", "worst parameter", title_justify="left")
    table.title = "Agreement on one batch, relative to the baseline in float64"
    for row in rows:
        for pair, name in pairs.items():
            loss, gradient = row[pair]["loss"], row[pair]["gradient"]
            errors = loss["max_rel"], gradient["norm_rel"], gradient["max_rel"]
            table.add_row(row["preset"], name, *(f"{error:.1e}" for error in errors))
    return table


def _costs(costs: dict[str, Any]) -> Any:
    from rich.table import Table

    from tuna.compare.demo_picture import size

    def seconds(value: float) -> str:
        return f"{value:.2f} s"

    tuna, baseline = costs["tuna"], costs["baseline"]
    table = Table("a step", "Tuna", "baseline", "ratio", title="Costs on the same batches", title_justify="left")
    rows: dict[str, tuple[float, float, Callable[[float], str]]] = {
        "wall time, median": (median(tuna["wall"]), median(baseline["wall"]), seconds),
        "CPU time, median": (median(tuna["cpu"]), median(baseline["cpu"]), seconds),
        "tokens computed, all batches": (tuna["tokens"], baseline["tokens"], "{:,}".format),
        "memory above weights, allocator": (tuna["allocator_peak"], baseline["allocator_peak"], size),
        "memory above weights, process": (tuna["growth"], baseline["growth"], size),
        "process in all": (tuna["process"], baseline["process"], size),
    }
    for name, (ours, theirs, shown) in rows.items():
        table.add_row(name, shown(ours), shown(theirs), f"{ours / theirs:.2f}")
    return table


def _learned(training: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("held out", "before", "after", title="What training changed", title_justify="left")
    for name in ("rank/accuracy", "rank/top1", "rank/kendall", "margin/mean", "loss/rank", "loss/mle"):
        key = f"eval_{name}"
        if key in training["before"]:
            table.add_row(name, f"{training['before'][key]:.4f}", f"{training['after'][key]:.4f}")
    return table
