"""`tuna demo`: the whole way on a few ranked groups, our step beside the baseline step, in minutes on a CPU.

Three parts, one function each: do both ways agree (`compare_results`), what does a step take (`compare_costs`), and
does training learn the ranking (`train`). `run_demo` goes through them and leaves `demo.json` and `demo.png`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from tuna.compare.memory_meter import allocator_peak
from tuna.compare.side_by_side import WAYS, Agreement, LossSettings, Stepper, Way, agreement, count_tokens, step_memory
from tuna.data.records import Record, read_records
from tuna.data.split import hold_out
from tuna.data.tokenization import TokenizedGroup, tokenize_records
from tuna.data.vocabulary import check_vocabulary
from tuna.models.loading import SMOLLM2, TINY, load_model
from tuna.system.common_settings import HELP
from tuna.system.writing import write_json
from tuna.train.config import TunaConfig
from tuna.train.trainer import TunaTrainer
from tuna_kernels import Group
from tuna_kernels.losses import Preset

__all__ = ["Costs", "DemoSettings", "run_demo"]

HELD_OUT = 1 / 3
EVALUATIONS = 4
PRESETS: tuple[Preset, ...] = ("paper", "released")
Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does. The defaults suit SmolLM2-135M and the examples shipped; `tiny` suits the random model.

    `groups` is a batch, in training and in the comparison; `compare_batches` are timed, each both ways.
    """

    model: str = SMOLLM2
    data: str | None = field(default=None, metadata={"help": "Ranked records to use instead of the examples."})
    limit: int | None = field(default=None, metadata={"help": HELP["limit"]})
    steps: int = field(default=40, metadata={"help": "Optimizer steps to train for."})
    groups: int = field(default=2, metadata={"help": "Groups per batch."})
    compare_batches: int = 3
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    preset: Preset = field(
        default="paper", metadata={"help": "Form of the loss: the paper's, or that of the authors' released code."}
    )
    mle_weight: float = 0.2
    max_length: int = field(default=256, metadata={"help": "Maximum length of prompt plus response, in tokens."})
    template: str = field(
        default="chat", metadata={"help": "Prompt template: none, chat, alpaca or a text with {prompt}."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the hold-out, the batches and the data order."})

    @classmethod
    def tiny(cls, **changes: Any) -> DemoSettings:
        """For the tiny random model: larger steps of more groups."""
        return cls(**{"model": TINY, "learning_rate": 3e-3, "groups": 4, "compare_batches": 5, **changes})

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "groups": 1,
            "compare_batches": 1,
            "limit": 1,
            "max_length": 2,
            "seed": 0,
            "learning_rate": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name} = {value} must be at least {bound}")

    @property
    def loss(self) -> LossSettings:
        """What the losses of both ways are told."""
        return LossSettings(preset=self.preset, mle_weight=self.mle_weight)


@dataclass(frozen=True)
class Costs:
    """What one way took. Times are seconds of each batch, memory is bytes.

    `allocator_peak`: above weights and optimizer state, as torch counts; `growth`: the same of a fresh process, and
    `process` that process in all; all on the batch that is largest when padded.
    """

    way: Way
    cpu: list[float]
    wall: list[float]
    tokens: int
    allocator_peak: int
    growth: int
    process: int

    @property
    def seconds(self) -> float:
        """Median wall time of a step."""
        return median(self.wall)


def run_demo(
    settings: DemoSettings,
    output: Path,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    say: Say = lambda _: None,
    machine: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the demo and write `demo.json` and `demo.png` to `output`; returns what the JSON holds.

    Args:
        settings: model, data and sizes.
        output: folder, made where it is missing.
        callbacks: of the trainer, to show progress.
        say: told what happens next, a line at a time.
        machine: what the demo runs on, for the record.

    Raises:
        ValueError, FileNotFoundError: data, model or settings that cannot be used.
    """
    from tuna.compare.demo_picture import draw_demo

    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    say(f"loading {settings.model}")
    model, tokenizer = load_model(settings.model)
    groups = read_groups(settings, tokenizer)
    check_vocabulary(model, groups, tokenizer)
    train_set, held_out = split(groups, settings.seed)
    batches = draw_batches([item.group for item in train_set], settings)
    agreements = compare_results(model, batches[0][:1], settings, say)
    costs = compare_costs(model, batches, settings, say)
    trained = train(model, tokenizer, train_set, held_out, settings, output, list(callbacks), say)
    results = {
        "settings": asdict(settings),
        "machine": {"threads": torch.get_num_threads(), **(machine or {})},
        "groups": {"train": len(train_set), "held_out": len(held_out)},
        "agreement": [asdict(one) for one in agreements],
        "costs": {one.way: asdict(one) for one in costs},
        "training": trained,
        "seconds": time.perf_counter() - started,
    }
    write_json(output / "demo.json", results)
    draw_demo(results, output / "demo.png")
    return results


def read_groups(settings: DemoSettings, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedGroup]:
    """The records in tokens; those whose prompt leaves no room for a response are left out."""
    groups, problems = tokenize_records(
        read_demo_records(settings.data)[: settings.limit],
        tokenizer,
        template=settings.template,
        max_length=settings.max_length,
        on_bad="skip",
    )
    if len(groups) < 3:
        reason = f"; the first problem: {problems[0]}" if problems else ""
        raise ValueError(f"data has {len(groups)} records that can be used, the demo needs 3 at least{reason}")
    return groups


def read_demo_records(data: str | None) -> list[Record]:
    """Records of a file, or the examples shipped."""
    if data is not None:
        return read_records(data).records
    with resources.as_file(resources.files("tuna.data") / "examples" / "ranked_demo.jsonl") as path:
        return read_records(path).records


def split(groups: Sequence[TokenizedGroup], seed: int) -> tuple[list[TokenizedGroup], list[TokenizedGroup]]:
    """Two thirds to train on and one third held out, at random by `seed`, both in the order given."""
    keys = [repr(list(map(int, group.group.prompt))) for group in groups]
    held = hold_out(keys, HELD_OUT, seed)
    pairs = list(zip(groups, keys, strict=True))
    return [group for group, key in pairs if key not in held], [group for group, key in pairs if key in held]


def draw_batches(groups: Sequence[Group], settings: DemoSettings) -> list[list[Group]]:
    """Random batches to compare on, the one that is largest when padded first."""
    maker = np.random.default_rng(settings.seed)
    size = min(settings.groups, len(groups))
    batches = [[groups[i] for i in maker.permutation(len(groups))[:size]] for _ in range(settings.compare_batches)]
    return sorted(batches, key=lambda batch: -count_tokens(batch).padded)


def compare_results(model: nn.Module, batch: Sequence[Group], settings: DemoSettings, say: Say) -> list[Agreement]:
    """Loss and all gradients of one batch both ways, under both presets."""
    found = []
    for preset in PRESETS:
        say(f"loss and gradients of {len(batch)} group(s) both ways and in float64, preset {preset}")
        found.append(agreement(model, batch, replace(settings.loss, preset=preset)))
    return found


def compare_costs(
    model: nn.Module, batches: Sequence[Sequence[Group]], settings: DemoSettings, say: Say
) -> list[Costs]:
    """Time, memory and tokens of a step both ways on the same batches, the order changing from batch to batch.

    Learning rate 0: the weights stay as they are.
    """
    steppers: dict[Way, Stepper] = {}
    peaks: dict[Way, int] = {}
    for way in WAYS:
        say(f"a step the {way} way: first call, memory of the allocator")
        network = copy.deepcopy(model).train()
        steppers[way] = Stepper(way, network, settings.loss)
        steppers[way](batches[-1])  # makes the optimizer's state
        steppers[way].optimizer.zero_grad()
        peaks[way] = allocator_peak(lambda way=way: steppers[way](batches[0]))  # type: ignore[misc]
    times: dict[Way, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number, batch in enumerate(batches):
        for way in WAYS if number % 2 else reversed(WAYS):
            say(f"timing batch {number + 1} of {len(batches)} the {way} way")
            before = time.process_time(), time.perf_counter()
            steppers[way](batch)
            times[way].append((time.process_time() - before[0], time.perf_counter() - before[1]))
    steppers.clear()  # before fresh processes take their memory
    costs = []
    for way in WAYS:
        say(f"memory of a fresh process that takes a step the {way} way")
        resident = step_memory(way, settings.model, batches[0], settings.loss, threads=torch.get_num_threads())
        counted = [count_tokens(batch) for batch in batches]
        tokens = sum(one.tree if way == "tuna" else one.padded for one in counted)
        cpu, wall = zip(*times[way], strict=True)
        costs.append(Costs(way, list(cpu), list(wall), tokens, peaks[way], resident.growth, resident.process))
    return costs


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Sequence[TokenizedGroup],
    held_out: Sequence[TokenizedGroup],
    settings: DemoSettings,
    output: Path,
    callbacks: list[TrainerCallback],
    say: Say,
) -> dict[str, Any]:
    """Train on the CPU with `TunaTrainer`; held-out figures before and after, and the trainer's log."""
    config = TunaConfig(
        output_dir=str(output),
        preset=settings.preset,
        mle_weight=settings.mle_weight,
        learning_rate=settings.learning_rate,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.groups,
        max_length=settings.max_length,
        template=settings.template,
        logging_steps=max(1, settings.steps // 20),
        eval_strategy="steps",
        eval_steps=max(1, settings.steps // EVALUATIONS),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=settings.seed,
    )
    trainer = TunaTrainer(model, config, train_set, held_out, tokenizer, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    say(f"ranking {len(held_out)} held-out groups before training")
    before = trainer.evaluate()
    say(f"training {settings.steps} steps of {settings.groups} groups")
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    last = evaluations[-1]
    after = last if last["step"] == trainer.state.global_step else trainer.evaluate()
    return {"before": before, "after": after, "seconds": seconds, "log": trainer.state.log_history}
