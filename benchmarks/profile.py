"""`python -m benchmarks.profile`: where the time of a training step goes: products, attention, head, the rest.

The same step as `benchmarks.step`, each way under torch's profiler. A part's time is what the thread that drives the
step spends in it (OpenMP's other threads work in the same parts at the same time), forward and backward together; what
is not named belongs to the rest. Writes `profile.json`, `profile.md` and `profile.png`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe_machine
from benchmarks.step import ARMS, read_batches
from tuna.compare.side_by_side import LossSettings, Stepper, Way, count_tokens
from tuna.models.loading import SMOLLM2, load_model
from tuna.system.writing import replacing, write_json
from tuna_kernels import Group, pack_groups

PARTS = ("products of the trunk", "attention", "head and loss", "optimizer", "norms, rotary, activations, rest")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
_LOSS = ("aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::log_softmax")


def part_of(event: Any, vocabulary: int) -> str:
    """The part that an event of the profiler belongs to: that of the outermost event around it that has a name here."""
    path = [event]
    while path[-1].cpu_parent is not None:
        path.append(path[-1].cpu_parent)
    for outer in reversed(path):
        name = outer.name
        if name.startswith("Optimizer."):
            return PARTS[3]
        if "tree_attention" in name or "scaled_dot_product" in name or "ScaledDotProduct" in name:
            return PARTS[1]
        if "ranking" in name.lower() or name.startswith("tuna_kernels::") or name in _LOSS:
            return PARTS[2]
        if name in _PRODUCTS:
            is_head = any(vocabulary in shape for shape in outer.input_shapes or () if isinstance(shape, list))
            return PARTS[2] if is_head else PARTS[0]
    return PARTS[4]


def profiled(stepper: Stepper, batch: Sequence[Group], vocabulary: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step by part, the mean of `rounds` after one that is not counted."""
    stepper(batch)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(rounds):
            stepper(batch)
    spent: defaultdict[str, float] = defaultdict(float)
    for event in seen.events() or ():
        spent[part_of(event, vocabulary)] += event.self_cpu_time_total / 1000 / rounds
    return {part: spent[part] for part in PARTS}


def packing(batch: Sequence[Group]) -> float:
    """Milliseconds to pack the batch, the least of ten."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        pack_groups(batch)
        times.append(time.perf_counter() - start)
    return min(times) * 1000


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and shares, one line a way and batch."""
    lines = [f"| groups | way | all | {' | '.join(PARTS)} |", "|---:|---|---:" + "|---:" * len(PARTS) + "|"]
    for row in rows:
        total = sum(row["parts"].values())
        shown = [f"{ms:,.0f} ms ({ms / total:.0%})" for ms in row["parts"].values()]
        lines.append(f"| {row['groups']} | {row['way']} | {total:,.0f} ms | {' | '.join(shown)} |")
    packed = ", ".join(f"{ms:.2f} ms for {n}" for n, ms in {r["groups"]: r["packing"] for r in rows}.items())
    return "\n".join([*lines, "", f"Packing, on a thread beside the step before: {packed} groups."])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A stacked bar for every row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 0.8 + 0.5 * len(rows)), layout="constrained")
    names = [f"{row['way']}, {row['groups']} groups" for row in rows]
    left = [0.0] * len(rows)
    for part in PARTS:
        seconds = [row["parts"][part] / 1000 for row in rows]
        axis.barh(names, seconds, left=left, label=part)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a step")
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def main(
    data: Annotated[Path | None, typer.Option(help="Ranked records. Default: the examples shipped.")] = None,
    model: Annotated[str, typer.Option(help="smollm2-135m, tiny, or a folder.")] = SMOLLM2,
    groups: Annotated[list[int] | None, typer.Option(help="Groups a batch; may be repeated. Default 2.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="tuna, baseline, plain tree; may be repeated.")] = None,
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt and response.")] = 256,
    template: Annotated[str, typer.Option(help="none, chat, alpaca or a text with {prompt}.")] = "alpaca",
    rounds: Annotated[int, typer.Option(help="Steps under the profiler.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads of torch and OpenMP.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the choice of batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for profile.json, .md and .png.")] = Path("results/local"),
) -> None:
    """Profile whole training steps; write JSON, a Markdown table and a picture."""
    if unknown := set(way or ()) - set(ARMS):
        raise typer.BadParameter(f"--way {', '.join(sorted(unknown))} is not one of {', '.join(ARMS)}")
    torch.set_num_threads(threads)
    ways: tuple[Way, ...] = tuple(arm for arm in ARMS if not way or arm in way)
    rows: list[dict[str, Any]] = []
    for batch in read_batches(data, model, template, max_length, sorted(groups or [2]), seed):
        for one in ways:
            loaded, _ = load_model(model)
            loaded.train()
            stepper = Stepper(one, loaded, LossSettings(preset="released"))
            parts = profiled(stepper, batch, int(loaded.config.vocab_size), rounds)
            tokens = count_tokens(batch)
            row = {"groups": len(batch), "way": one, "tokens": tokens.tree, "parts": parts, "packing": packing(batch)}
            rows.append(row)
            typer.echo(f"{len(batch)} groups, {one}: {sum(parts.values()):,.0f} ms")
    text = table(rows)
    output.mkdir(parents=True, exist_ok=True)
    setup = {"model": model, "max_length": max_length, "template": template, "threads": threads, "rounds": rounds}
    write_json(
        output / "profile.json", {"setup": setup, "machine": asdict(describe_machine(("transformers",))), "rows": rows}
    )
    with replacing(output / "profile.md") as file:
        file.write((text + "\n").encode())
    draw(rows, output / "profile.png")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
