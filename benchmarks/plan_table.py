"""How few GPUs a 7B Tuna needs: every way to compute the step, full and LoRA, on cards of 24 to 80 GB.

    python -m benchmarks.plan_table --output benchmarks/results

Nothing is trained and no GPU is needed: steps are simulated (`tuna.plan`). Writes ``plan_7b.json``,
``plan_7b.md`` and ``plan_7b.png``. Some minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuna.files import replacing
from tuna.plan.cards import find_card
from tuna.plan.comparison import brief
from tuna.plan.picture import NAMES, draw_bars
from tuna.plan.planner import GIB, Plan, Planner, Request, fewest_gpus
from tuna.plan.settings import StepSettings
from tuna.plan.simulate import Simulator
from tuna.plan.sizes import model_config
from tuna.plan.states import Optimizer, Sharding
from tuna.plan.workload import METHODS, Method, Workload
from tuna.report import write_json

MODELS = ("llama-7b", "llama3-8b")
CARDS = ("rtx3090", "rtx5090", "a100-40", "a6000", "a100-80")
LIMITS = (512, 1024, 2048)
RESPONSES = 5
LORA_RANK = 16
OFFICIAL_GROUPS = 16
"""Groups of a micro-batch of the released recipe, on each GPU."""


@dataclass(frozen=True)
class Training:
    """What is trained: everything with one optimizer or the other, or adapters."""

    name: str
    optimizer: Optimizer
    lora_rank: int | None


TRAININGS = (
    Training("full", "adamw", None),
    Training("full, bf16 states", "kahan", None),
    Training(f"LoRA rank {LORA_RANK}", "adamw", LORA_RANK),
)


@lru_cache
def workload_of(limit: int) -> Workload:
    """k = 5 responses; half of the limit is prompt, half response, both full."""
    return Workload(RESPONSES, limit // 2, limit - limit // 2)


def table(planner: Planner, model: str) -> Iterator[dict[str, Any]]:
    """One entry for each limit, training and method; on every card the fewest GPUs for one group."""
    for limit in LIMITS:
        workload = workload_of(limit)
        for training in TRAININGS:
            for method, groups in [*((method, 1) for method in METHODS), ("released", OFFICIAL_GROUPS)]:
                settings = StepSettings(method=method, lora_rank=training.lora_rank)
                request = Request(find_card("a100-80"), workload, groups, settings, optimizer=training.optimizer)
                step = planner.simulator.step(workload, groups, settings)
                yield {
                    "model": model,
                    "limit": limit,
                    "training": training.name,
                    "method": method,
                    "groups": groups,
                    "step_peak_gib": round(step.peak / GIB, 2),
                    "step_saved_gib": round(step.saved / GIB, 2),
                    "step_peak_at": step.peak_at,
                    "tokens": step.tokens,
                    "tflop": round(step.flops / 1e12, 1),
                    "cards": {card: _on_card(planner, replace(request, card=find_card(card))) for card in CARDS},
                }


def _on_card(planner: Planner, request: Request) -> dict[str, Any]:
    plain = fewest_gpus(planner, request)
    offloaded = fewest_gpus(planner, request, ("optimizer", "all"))
    return {
        "without_offload": brief(plain) if plain else None,
        "with_offload": brief(offloaded) if offloaded else None,
    }


def known_point(planner: Planner) -> dict[str, Any]:
    """The released loss at 16 groups of 5 x 512 tokens, fp16, under activation checkpointing."""
    import torch

    found: dict[str, Any] = {}
    for method in METHODS:
        step = planner.simulator.step(workload_of(512), OFFICIAL_GROUPS, StepSettings(method, torch.float16))
        found[method] = {
            "peak_gib": round(step.peak / GIB, 2),
            "peak_at": step.peak_at,
            "saved_gib": round(step.saved / GIB, 2),
            "moments_gib": {name: round(value / GIB, 2) for name, value in step.moments.items()},
        }
    return found


def markdown(entries: Sequence[dict[str, Any]], known: dict[str, Any]) -> str:
    """The tables as text."""
    lines = [
        "# How few GPUs: LLaMA-7B and Llama-3-8B, k = 5",
        "",
        "`python -m benchmarks.plan_table` (no GPU: steps are simulated, see `docs/plan.md`). A cell is the fewest "
        "GPUs of 1, 2, 4 … 64 whose memory holds the micro-batch, the ZeRO stage, and the GiB that each then holds; "
        "behind the bar, with states offloaded to the host and the GiB of host memory a node then needs. bf16, "
        "activation checkpointing, prompt and response half the limit each and full.",
    ]
    for model in MODELS:
        for training in TRAININGS:
            lines += ["", f"## {model}, {training.name}", ""]
            head = ["limit", "way", "groups", "step, GiB", *(find_card(card).label for card in CARDS)]
            lines += [_line(head), _line(["---"] * len(head))]
            chosen = [e for e in entries if e["model"] == model and e["training"] == training.name]
            for entry in chosen:
                cells = [_cell(entry["cards"][card]) for card in CARDS]
                name = NAMES[entry["method"]]
                lines.append(
                    _line([str(entry["limit"]), name, str(entry["groups"]), f"{entry['step_peak_gib']:.2f}", *cells])
                )
    lines += ["", "## The known point", ""]
    lines += ["LLaMA-7B, 16 groups of 5 x 512 tokens, fp16, activation checkpointing; GiB above model states.", ""]
    lines += [_line(["way", "peak", "at", "held for the backward"]), _line(["---"] * 4)]
    for method, step in known.items():
        lines.append(_line([NAMES[method], str(step["peak_gib"]), step["peak_at"], str(step["saved_gib"])]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(found: dict[str, Any]) -> str:
    plain, offloaded = found["without_offload"], found["with_offload"]
    text = f"{plain['gpus']} (Z{plain['zero']}, {plain['peak_gib']:.0f})" if plain else "over 64"
    if plain and plain["gpus"] == 1:
        return text
    if offloaded is None:
        return f"{text} \\| over 64"
    held = f"Z{offloaded['zero']}, {offloaded['peak_gib']:.0f}; host {offloaded['host_gib']:.0f}"
    return f"{text} \\| {offloaded['gpus']} ({held})"


def draw(path: Path, planners: dict[str, Planner]) -> None:
    """One GPU: full training with bf16 states, and LoRA, of both models, by method, at 2048 tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    for row, (model, planner) in zip(grid, planners.items(), strict=True):
        for axes, training in zip(row, TRAININGS[1:], strict=True):
            plans = {NAMES[method]: _one_gpu(planner, training, method) for method in METHODS}
            lines = {find_card(name).memory_gib: find_card(name).label for name in ("rtx3090", "a6000", "a100-80")}
            draw_bars(axes, {name: plan.parts() for name, plan in plans.items()}, lines)
            axes.set_title(f"{model}, {training.name}\n", loc="left", fontsize=11, fontweight="bold")
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    figure.suptitle("One GPU, one group of 5 x 2048 tokens, bf16, activation checkpointing (simulated)", fontsize=12)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _one_gpu(planner: Planner, training: Training, method: Method) -> Plan:
    settings = StepSettings(method=method, lora_rank=training.lora_rank)
    card = find_card("a100-80")
    return planner.plan(Request(card, workload_of(2048), 1, settings, Sharding(), training.optimizer))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    planners = {model: Planner(Simulator(model_config(model))) for model in MODELS}
    entries = []
    for model, planner in planners.items():
        for entry in table(planner, model):
            entries.append(entry)
            print(model, entry["limit"], entry["training"], entry["method"], entry["groups"], entry["step_peak_gib"])
    known = known_point(planners["llama-7b"])
    write_json(options.output / "plan_7b.json", {"entries": entries, "known_point": known})
    with replacing(options.output / "plan_7b.md") as file:
        file.write(markdown(entries, known).encode())
    draw(options.output / "plan_7b.png", planners)


if __name__ == "__main__":
    main()
