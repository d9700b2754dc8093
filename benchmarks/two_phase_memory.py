"""Memory of one training step against k: k padded copies, one pass over the packed tree, two phases.

    python -m benchmarks.two_phase_memory --output benchmarks/results/two_phase_memory

Every figure is the largest number of bytes that torch's allocator held at once during forward and backward
(`memory_meter.allocator_peak`), gradients included, on a small random Llama in float32. Bytes asked for do not depend
on the load of the machine. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png, and prints the table. A minute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tuna.compare.baseline import baseline_step_loss
from tuna.compare.memory_meter import allocator_peak
from tuna.system.writing import replacing
from tuna.train.memory_mode import ActivationModel
from tuna_kernels import Group, pack_groups
from tuna_kernels.integrations.transformers import model_ranking_loss, prepare_model, two_phase_ranking_loss

ARMS = ("baseline", "one pass", "two phases")


def small_llama(layers: int) -> LlamaForCausalLM:
    """A random Llama, prepared for trees, its gradients allocated."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=layers, num_key_value_heads=2, **sizes)
    model = prepare_model(LlamaForCausalLM(config))
    model.train()
    return model


def one_group(k: int, prompt: int, response: int) -> Group:
    """k responses of one length."""
    draw = np.random.default_rng(0)
    responses = [draw.integers(0, 512, response) for _ in range(k)]
    return Group(draw.integers(0, 512, prompt), responses, ranks=np.arange(k))


def peaks(model: LlamaForCausalLM, group: Group, arms: Sequence[str] = ARMS) -> dict[str, int]:
    """Bytes of each arm at its peak."""
    tree = pack_groups([group])

    def baseline() -> None:
        baseline_step_loss(model, [group], preset="released").loss.backward()  # type: ignore[no-untyped-call]

    def one_pass() -> None:
        model_ranking_loss(model, tree, preset="released", logits_budget=0).loss.backward()  # type: ignore[no-untyped-call]

    def two_phases() -> None:
        two_phase_ranking_loss(model, tree, preset="released")

    found = {}
    calls = dict(zip(ARMS, (baseline, one_pass, two_phases), strict=True))
    for name in arms:
        calls[name]()  # gradients exist from here on, and are no part of the peak
        found[name] = allocator_peak(calls[name])
    return found


def measure(ks: list[int], prompt: int, response: int, layers: int) -> list[dict[str, Any]]:
    """One row a k and mode of checkpointing."""
    rows = []
    for checkpointed in (False, True):
        model = small_llama(layers)
        if checkpointed:
            model.activation_checkpointing_enable()
        estimate = ActivationModel.of(model.config, torch.float32, checkpointed=checkpointed, logits_budget=0)
        for k in ks:
            group = one_group(k, prompt, response)
            tree = pack_groups([group])
            rows.append(
                {
                    "k": k,
                    "checkpointed": checkpointed,
                    "bytes": peaks(model, group),
                    "estimated": {"one pass": estimate.one_pass(tree), "two phases": estimate.two_phase(tree, 1)},
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in MiB."""
    lines = [
        "| checkpointing | k | baseline | one pass (estimated) | two phases (estimated) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        mib = {name: value / 2**20 for name, value in row["bytes"].items()}
        guess = {name: value / 2**20 for name, value in row["estimated"].items()}
        shown = [f"{mib[name]:.1f} ({guess[name]:.1f})" for name in ARMS[1:]]
        checkpointed = "yes" if row["checkpointed"] else "no"
        lines.append(f"| {checkpointed} | {row['k']} | {mib['baseline']:.1f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """Memory against k, without and with checkpointing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, checkpointed in zip(axes, (False, True), strict=True):
        chosen = [row for row in rows if row["checkpointed"] is checkpointed]
        for name in ARMS:
            axis.plot([r["k"] for r in chosen], [r["bytes"][name] / 2**20 for r in chosen], marker="o", label=name)
        axis.set(xlabel="responses k", ylabel="peak of forward and backward, MiB", ylim=(0, None))
        axis.set_title("activation checkpointing" if checkpointed else "no checkpointing")
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/two_phase_memory"))
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--response", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    rows = measure(given.k, given.prompt, given.response, given.layers)
    setup = {"prompt": given.prompt, "response": given.response, "layers": given.layers, "dtype": "float32"}
    record = {"setup": {**setup, "torch": torch.__version__}, "rows": rows}
    with replacing(given.output.with_suffix(".json")) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    with replacing(given.output.with_suffix(".md")) as file:
        file.write(f"{table(rows)}\n".encode())
    picture(rows, given.output.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
