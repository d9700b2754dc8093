"""How few GPUs a 7B Tuna needs: every way to compute the step, full and LoRA, on cards of 24 to 80 GB.

    python -m benchmarks.plan_table --output benchmarks/results

Nothing is trained and no GPU is needed: steps are simulated (`tuna.plan`). Writes `plan_7b.json`,
`plan_7b.md` and `plan_7b.png`. Some minutes, a process a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuna.plan.cards import find_card
from tuna.plan.comparison import brief
from tuna.plan.picture import NAMES, draw_bars
from tuna.plan.planner import GIB, Plan, Planner, fewest_gpus
from tuna.plan.settings import Optimizer, PlanRequest, Sharding, StepSettings
from tuna.plan.simulate import Simulator
from tuna.plan.sizes import model_config
from tuna.plan.workload import METHODS, Method, Workload
from tuna.system.writing import replacing, write_json

MODELS = ("llama-7b", "llama3-8b")
CARDS = ("rtx3090", "rtx5090", "a100-40", "a6000", "a100-80")
LIMITS = (512, 1024, 2048)
RESPONSES = 5
LORA_RANK = 16
OFFICIAL_GROUPS = 16
"""Groups of a micro-batch of the paper's recipe, on each GPU."""


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
            official: list[tuple[Method, int]] = [("baseline", OFFICIAL_GROUPS)] if limit == LIMITS[0] else []
            for method, groups in [*((method, 1) for method in METHODS), *official]:
                settings = StepSettings(method=method, lora_rank=training.lora_rank)
                request = PlanRequest(find_card("a100-80"), workload, groups, settings, optimizer=training.optimizer)
                step = planner.simulator.step(workload, groups, settings)
                print(model, limit, training.name, method, groups, f"{step.peak / GIB:.2f} GiB", flush=True)
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


def _on_card(planner: Planner, request: PlanRequest) -> dict[str, Any]:
    plain = fewest_gpus(planner, request)
    offloaded = fewest_gpus(planner, request, ("optimizer", "all"))
    return {
        "without_offload": brief(plain) if plain else None,
        "with_offload": brief(offloaded) if offloaded else None,
    }


def known_point(planner: Planner) -> dict[str, Any]:
    """The baseline at 16 groups of 5 x 512 tokens, fp16, under activation checkpointing."""
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


@dataclass(frozen=True)
class Found:
    """What a process of its own finds out about a model; `bars`: parts of the plans that are drawn."""

    entries: list[dict[str, Any]]
    bars: dict[str, dict[str, dict[str, int]]]
    known: dict[str, Any]


def of_model(model: str) -> Found:
    """Every simulation of one model."""
    planner = Planner(Simulator(model_config(model)))
    entries = list(table(planner, model))
    bars = {t.name: {NAMES[m]: _one_gpu(planner, t, m).parts() for m in METHODS} for t in TRAININGS[1:]}
    return Found(entries, bars, known_point(planner) if model == MODELS[0] else {})


def draw(path: Path, found: dict[str, Found]) -> None:
    """One GPU: full training with bf16 states, and LoRA, of both models, by method, at 2048 tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    lines = {find_card(name).memory_gib: find_card(name).label for name in ("rtx3090", "a6000", "a100-80")}
    for row, (model, of_one) in zip(grid, found.items(), strict=True):
        for axes, (training, bars) in zip(row, of_one.bars.items(), strict=True):
            draw_bars(axes, bars, lines)
            axes.set_title(f"{model}, {training}\n", loc="left", fontsize=11, fontweight="bold")
    legends = [axes.get_legend_handles_labels() for axes in grid.flat]
    handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    figure.suptitle("One GPU, one group of 5 x 2048 tokens, bf16, activation checkpointing (simulated)", fontsize=12)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _one_gpu(planner: Planner, training: Training, method: Method) -> Plan:
    settings = StepSettings(method=method, lora_rank=training.lora_rank)
    card = find_card("a100-80")
    return planner.plan(PlanRequest(card, workload_of(LIMITS[-1]), 1, settings, Sharding(), training.optimizer))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(len(MODELS)) as processes:
        found = dict(zip(MODELS, processes.map(of_model, MODELS), strict=True))
    entries = [entry for of_one in found.values() for entry in of_one.entries]
    known = found[MODELS[0]].known
    write_json(options.output / "plan_7b.json", {"entries": entries, "known_point": known})
    with replacing(options.output / "plan_7b.md") as file:
        file.write(markdown(entries, known).encode())
    draw(options.output / "plan_7b.png", found)


if __name__ == "__main__":
    main()
