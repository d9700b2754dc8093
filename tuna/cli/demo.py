"""`tuna demo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from tuna.cli.flags import Flags
from tuna.cli.options import Threads

__all__ = ["demo"]


def demo(
    settings: Annotated[
        dict[str, Any],
        Flags(
            "tuna.compare.demo:DemoSettings",
            "data steps groups lr=learning_rate preset template max_length limit seed",
            unset=True,
        ),
    ],
    tiny: Annotated[bool, typer.Option("--tiny", help="Train a tiny random model instead of SmolLM2-135M.")] = False,
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("runs/demo"),
) -> None:
    """Train on ranked responses, with our step beside the baseline's.

    Shows on the CPU whether losses and gradients agree, what a step of each takes in time, memory and tokens, and how
    well held-out responses are ranked before and after training.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from tuna.cli.info import collect_info
    from tuna.compare.demo import DemoSettings, run_demo
    from tuna.console.next import say_next
    from tuna.console.terminal import Terminal
    from tuna.train.progress import TrainingProgress

    if threads is not None:
        torch.set_num_threads(threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # it would cut through ours
    chosen = DemoSettings.tiny(**settings) if tiny else DemoSettings(**settings)
    console = Terminal()
    results = run_demo(
        chosen,
        output,
        callbacks=[TrainingProgress(console)],
        say=lambda line: console.print(f"{line} …", style="dim", highlight=False),
        machine=collect_info(),
    )
    for table in demo_tables(results):
        console.print(table)
    console.print(f"{results['seconds']:.0f} s in all; demo.json and demo.png are in {output}", highlight=False)
    say_next(console, "train", model=chosen.model, data="DATA", output="FOLDER")


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
