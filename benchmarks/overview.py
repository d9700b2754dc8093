"""`python -m benchmarks.overview`: the picture of the README, from a record in `benchmarks/results`.

Left, what is computed for a prompt with four responses; right, what a training step takes: tokens, time, memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from benchmarks.document import RESULTS
from benchmarks.record import Comparison, read_record

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

PICTURE = RESULTS.parents[1] / "docs" / "overview.png"
RECORD = RESULTS / "step_limit_512.json"
ARMS = {"baseline": "padded copies, full logits", "plain tree": "tree in plain PyTorch", "tuna": "Tuna"}
PROMPT, RESPONSE, PADDING, OURS, OTHERS = "#8c9bb5", "#f0a35e", "#e4e4e4", "#d9622b", "#b9bfca"

# A prompt of 8 tokens, four responses; the first two begin with the same 3 tokens, the next two with the same 2.
PROMPT_TOKENS, RESPONSES, SHARED = 8, (9, 7, 12, 5), ((0, 3), (0, 3), (1, 2), (1, 2))


def _cells(axes: Any, x: float, y: float, count: int, colour: str) -> None:
    for i in range(count):
        axes.add_patch(Rectangle((x + i, y), 0.9, 0.8, facecolor=colour, edgecolor="white", linewidth=0.5))


def _draw_copies(axes: Any, top: float) -> int:
    longest = PROMPT_TOKENS + max(RESPONSES)
    for k, length in enumerate(RESPONSES):
        y = top - k
        _cells(axes, 0, y, PROMPT_TOKENS, PROMPT)
        _cells(axes, PROMPT_TOKENS, y, length, RESPONSE)
        _cells(axes, PROMPT_TOKENS + length, y, longest - PROMPT_TOKENS - length, PADDING)
    return longest * len(RESPONSES)


def _draw_tree(axes: Any, top: float) -> int:
    """Every common beginning once; a line leads from a fork to each of its branches."""
    fork = top - 1.5
    _cells(axes, 0, fork, PROMPT_TOKENS, PROMPT)
    count = PROMPT_TOKENS
    for branch in (0, 1):
        members = [k for k, (which, _) in enumerate(SHARED) if which == branch]
        common = SHARED[members[0]][1]
        middle = top - sum(members) / len(members)
        axes.plot([PROMPT_TOKENS, PROMPT_TOKENS + 1], [fork + 0.4, middle + 0.4], color="#555555", linewidth=0.8)
        _cells(axes, PROMPT_TOKENS + 1, middle, common, RESPONSE)
        count += common
        for k in members:
            start = PROMPT_TOKENS + 1 + common
            axes.plot([start, start + 1], [middle + 0.4, top - k + 0.4], color="#555555", linewidth=0.8)
            _cells(axes, start + 1, top - k, RESPONSES[k] - common, RESPONSE)
            count += RESPONSES[k] - common
    return count


def _draw_idea(axes: Any) -> None:
    copies = _draw_copies(axes, 9)
    tree = _draw_tree(axes, 3)
    axes.text(0, 10.1, f"k padded copies: {copies} tokens", fontsize=10)
    axes.text(0, 4.1, f"one prefix tree: {tree} tokens", fontsize=10, color=OURS, fontweight="bold")
    for x, colour, word in ((0, PROMPT, "prompt"), (6, RESPONSE, "response"), (13, PADDING, "padding")):
        _cells(axes, x, -1.8, 1, colour)
        axes.text(x + 1.2, -1.7, word, fontsize=8, color="#444444")
    axes.set_xlim(-0.2, 21)
    axes.set_ylim(-2, 11)
    axes.set_aspect("equal")
    axes.axis("off")


def _draw_bars(axes: Any, title: str, values: list[float], shown: list[str]) -> None:
    colours = [OURS if name == "tuna" else OTHERS for name in ARMS]
    axes.barh(range(len(values)), values, color=colours, height=0.62)
    for place, (value, text) in enumerate(zip(values, shown, strict=True)):
        axes.text(value + max(values) * 0.03, place, text, va="center", fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_yticks([])
    axes.set_xticks([])
    axes.set_xlim(0, max(values) * 1.45)
    axes.invert_yaxis()
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _step(record: Path) -> Comparison:
    return next(table for table in read_record(record).comparisons if table.title.startswith("training step"))


def draw(record: Path, output: Path) -> None:
    """Draw the picture from the record of a training step."""
    table = _step(record)
    arms = [table.arm(name) for name in ARMS]
    seconds = [arm.cpu.min if arm.cpu else float("nan") for arm in arms]
    memory = [(arm.allocator_peak or 0) / 2**30 for arm in arms]
    padded, tree = (float(table.setting[name]) for name in ("padded", "tree"))
    tokens = [padded, tree, tree]
    figure = plt.figure(figsize=(11, 3.5), dpi=160)
    grid = figure.add_gridspec(1, 4, width_ratios=(2.0, 1, 1, 1), wspace=0.08)
    _draw_idea(figure.add_subplot(grid[0]))
    bars = [figure.add_subplot(grid[place]) for place in (1, 2, 3)]
    _draw_bars(bars[0], "tokens computed", tokens, [f"{value:,.0f}" for value in tokens])
    _draw_bars(bars[1], "CPU time of a step", seconds, [f"{value:.0f} s" for value in seconds])
    _draw_bars(bars[2], "memory of a step", memory, [f"{value:.1f} GiB" for value in memory])
    for place, label in enumerate(ARMS.values()):
        bars[0].text(tokens[0] * 0.02, place - 0.35, label, fontsize=8, va="bottom", color="#444444")
    figure.savefig(output, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def main(
    record: Annotated[Path, typer.Option(help="Record of a training step.")] = RECORD,
    output: Annotated[Path, typer.Option(help="The picture.")] = PICTURE,
) -> None:
    """Draw the picture of the README."""
    draw(record, output)
    typer.echo(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
