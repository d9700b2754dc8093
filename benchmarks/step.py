"""`python -m benchmarks.step`: a whole training step of a real model on real ranked groups, ours beside the baseline.

For each number of groups a batch: agreement of loss and all gradients (both presets), time of the step (CPU and wall,
interleaved rounds), peak memory by the allocator and of a fresh process, tokens computed. See `compare.side_by_side`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import psutil
import torch
import typer
from torch import Tensor

from benchmarks.harness import Arm, Rounds, check_arm, compare
from benchmarks.record import ArmReport, Bound, Comparison, Setting
from benchmarks.report import Progress, Report
from tuna.compare.agreement import Results
from tuna.compare.memory_meter import ResidentPeak
from tuna.compare.side_by_side import (
    LossSettings,
    Stepper,
    Way,
    count_tokens,
    enable_checkpointing,
    gradients_of,
    loss_and_gradients,
    step_memory,
)
from tuna.data.records import read_records
from tuna.data.tokenization import tokenize_records
from tuna.models.loading import SMOLLM2, load_model, load_tokenizer
from tuna_kernels import Group
from tuna_kernels.losses import Preset

Batch = Sequence[Group]
DRAWS = 25
# float32 through thirty layers. The limit is there to catch a wrong arm, not to grade a right one: torch's own
# log_softmax over 49,152 columns is off by 1e-5 nats, which alone moves single parameters' gradients by 1e-3.
TOLERANCE = {"loss": 1e-4, "gradient": 1e-2}
GIB = 2**30
ARMS: tuple[Way, ...] = ("tuna", "baseline", "plain tree")
BOUNDS: dict[Way, Bound] = {
    "baseline": Bound("baseline step", {"baseline": 1}),
    "plain tree": Bound("plain-torch tree", {"plain tree": 1}),
}


@dataclass
class StepBench:
    """A model twice, ours and the baseline's, with what is known of the baseline's appetite so far."""

    name: str
    settings: LossSettings
    threads: int
    plan: Rounds
    resident: bool = True
    progress: Callable[[str], None] = lambda _: None
    ways: Sequence[Way] = ARMS
    checkpointed: bool = False
    steppers: dict[Way, Stepper] = field(init=False)
    baseline_bytes_per_token: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        model, _ = load_model(self.name)
        model.train()
        if self.checkpointed:
            enable_checkpointing(model)
        self.steppers = {way: Stepper(way, copy.deepcopy(model), self.settings) for way in self.ways}

    def run(self, batch: Batch, *, exact: bool = True) -> list[Comparison]:
        """Agreement of the two ways on a batch, then their times and memory.

        `exact`: hold both against the baseline in float64 (minutes for a large batch), else ours against float32.
        """
        if "baseline" not in self.ways or self.lacks_memory(count_tokens(batch).padded):
            oracle = self.gradients("tuna", batch, self.settings)
            return [self.compare_steps(batch, oracle, "our own float32 step, without the baseline")]
        fits = exact and not self.lacks_memory(2 * count_tokens(batch).padded)
        dtype = torch.float64 if fits else torch.float32
        second: Preset = "paper" if self.settings.preset == "released" else "released"
        reports: list[ArmReport] = []
        oracle = {}
        for preset in (second, self.settings.preset):  # the last oracle is that of the steps timed
            oracle.clear()
            settings = replace(self.settings, preset=preset)
            oracle = self.gradients("baseline", batch, settings, dtype)
            reports += self.agreement(batch, oracle, settings, dtype)
        title = f"agreement of loss and gradients, {self.name}, {_count(batch)}; oracle: {_baseline(dtype)}"
        agreement = Comparison(title, {"groups": len(batch)}, TOLERANCE, [], {}, reports)
        return [agreement, self.compare_steps(batch, oracle, _baseline(dtype))]

    def compare_steps(self, batch: Batch, oracle: Results, source: str) -> Comparison:
        """Check both ways against `oracle`, then time them."""
        tokens = count_tokens(batch)
        too_large = self.lacks_memory(tokens.padded)
        setting: Setting = {"groups": len(batch), "preset": self.settings.preset, **asdict(tokens)}
        comparison = compare(
            f"training step, {self.name}, {_count(batch)}, {tokens.tree:,} tokens in the tree, "
            f"{tokens.unshared:,} in separate sequences, {tokens.padded:,} in padded copies; oracle: {source}",
            [self.arm(way, too_large if way == "baseline" else "") for way in self.ways],
            batch,
            oracle=oracle,
            tolerance=TOLERANCE,
            units={"AdamW alone": self.steppers["tuna"].optimizer.step},
            bounds=[BOUNDS[way] for way in BOUNDS if way in self.ways],
            plan=self.plan,
            resident=self.memory_meter(batch) if self.resident else None,
            setting=setting,
            progress=self.progress,
        )
        peak = comparison.arm("baseline").allocator_peak if "baseline" in self.ways else None
        if peak is not None:
            self.baseline_bytes_per_token = max(self.baseline_bytes_per_token, peak / tokens.padded)
        return comparison

    def agreement(self, batch: Batch, oracle: Results, settings: LossSettings, dtype: torch.dtype) -> list[ArmReport]:
        """Both ways in float32 against `oracle`, and ours against the float32 baseline."""
        baseline = self.gradients("baseline", batch, settings) if dtype == torch.float64 else oracle

        def report(name: str, way: Way, against: Results) -> ArmReport:
            self.progress(f"agreement, {_count(batch)}: {name}")
            return replace(check_arm(self.arm(way, settings=settings), batch, against, TOLERANCE), name=name)

        preset = settings.preset
        between = report(f"tuna to float32 baseline, {preset}", "tuna", baseline)
        if dtype == torch.float32:
            return [between]
        return [report(f"tuna, {preset}", "tuna", oracle), report(f"baseline, {preset}", "baseline", oracle), between]

    def arm(self, way: Way, refusal: str = "", settings: LossSettings | None = None) -> Arm[Batch]:
        """One way as an arm of the harness; with `settings` it stops at the gradients."""
        stepper = self.steppers[way]

        def results(loss: Tensor) -> Results:
            return {"loss": loss, **gradients_of(stepper.model)}

        def loss_alone(batch: Batch) -> Tensor:
            return loss_and_gradients(way, stepper.model, batch, settings or self.settings)["loss"]

        notes = {
            "tuna": "prefix tree, model_ranking_loss",
            "baseline": "padded copies, full logits",
            "plain tree": "prefix tree in plain torch: SDPA with a [T, T] mask, logits of every slot",
        }
        call = stepper if settings is None else loss_alone
        return Arm(way, call, f"{notes[way]}, backward, AdamW", refuses=lambda _: refusal, results=results)

    def gradients(
        self, way: Way, batch: Batch, settings: LossSettings, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Loss and gradients of one way, computed in `dtype`."""
        self.progress(f"loss and gradients, {way}, {dtype}")
        model = copy.deepcopy(self.steppers[way].model).to(dtype)
        return loss_and_gradients(way, model, batch, settings)

    def lacks_memory(self, padded_tokens: int) -> str:
        """Why a baseline step on so many padded tokens would not fit, or "".

        Predicted from the bytes a padded token took in the batches before; a fresh process also needs the model, its
        gradients and the optimizer's state.
        """
        weights = sum(p.numel() * p.element_size() for p in self.steppers["tuna"].model.parameters())
        needed = self.baseline_bytes_per_token * padded_tokens + 4 * weights
        free = psutil.virtual_memory().available
        if self.baseline_bytes_per_token == 0 or needed < free:
            return ""
        return f"would take {needed / GIB:.1f} GiB by what smaller batches took; {free / GIB:.1f} GiB are free"

    def memory_meter(self, batch: Batch) -> Callable[[str], ResidentPeak]:
        """Runs an arm's step in a fresh process."""

        def measure(way: str) -> ResidentPeak:
            self.progress(f"memory of a fresh process, {way}")
            return step_memory(
                _way(way), self.name, batch, self.settings, threads=self.threads, checkpointed=self.checkpointed
            )

        return measure


def typical_batch(groups: Sequence[Group], size: int, seed: int) -> list[Group]:
    """Of 25 random batches of `size` groups, the one of median padded size.

    Raises:
        ValueError: fewer than `size` groups.
    """
    if size < 1 or size > len(groups):
        raise ValueError(f"a batch of {size} groups cannot be drawn from {len(groups)}")
    maker = np.random.default_rng(seed)
    draws = [[groups[i] for i in maker.permutation(len(groups))[:size]] for _ in range(DRAWS)]
    return sorted(draws, key=lambda batch: count_tokens(batch).padded)[DRAWS // 2]


def _way(name: str) -> Way:
    return next(way for way in ARMS if way == name)


def _count(batch: Batch) -> str:
    return f"{len(batch)} group" + ("s" if len(batch) > 1 else "")


def _baseline(dtype: torch.dtype) -> str:
    return f"the {str(dtype).removeprefix('torch.')} baseline"


def main(
    data: Annotated[Path | None, typer.Option(help="Ranked records. Default: the examples shipped.")] = None,
    model: Annotated[str, typer.Option(help="smollm2-135m, tiny, or a folder.")] = SMOLLM2,
    groups: Annotated[list[int] | None, typer.Option(help="Groups a batch; may be repeated. Default 1, 2, 4.")] = None,
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt and response.")] = 256,
    template: Annotated[str, typer.Option(help="none, chat, alpaca or a text with {prompt}.")] = "alpaca",
    preset: Annotated[Literal["paper", "released"], typer.Option(help="Of the steps timed.")] = "released",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch and OpenMP.")] = 2,
    resident: Annotated[bool, typer.Option(help="Measure process memory, each way in a fresh process.")] = True,
    exact: Annotated[
        bool, typer.Option(help="Hold the smallest batch against float64 too, which takes minutes.")
    ] = True,
    way: Annotated[
        list[str] | None, typer.Option(help="baseline or plain tree beside ours; may be repeated. Default: both.")
    ] = None,
    checkpointing: Annotated[bool, typer.Option(help="Activation checkpointing, in all ways.")] = False,
    once: Annotated[
        bool, typer.Option(help="One call an arm for check, memory and time: for steps of minutes.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for step.json, .md and .png.")] = Path("results/local"),
) -> None:
    """Compare whole training steps; write JSON, a Markdown table and a picture."""
    if threads < 1:
        raise typer.BadParameter(f"--threads {threads} must be at least 1")
    torch.set_num_threads(threads)
    if unknown := set(way or ()) - set(ARMS):
        raise typer.BadParameter(f"--way {', '.join(sorted(unknown))} is not one of {', '.join(ARMS)}")
    sizes = sorted(groups or [1, 2, 4])
    ways = tuple(arm for arm in ARMS if not way or arm in ("tuna", *way))
    told = {"model": model, "data": data.name if data else "examples", "template": template, "preset": preset}
    told |= {"max_length": str(max_length), "rounds": str(rounds), "threads": str(threads), "seed": str(seed)}
    told |= {"checkpointing": "yes"} if checkpointing else {}
    told |= {"once": "yes"} if once else {}
    report = Report("benchmarks.step", output, "step", ("transformers",), told)
    with Progress() as progress:
        progress(f"loading {model}")
        bench = StepBench(
            model,
            LossSettings(preset=preset),
            threads,
            Rounds(1 if once else rounds, once=once),
            resident and not once,
            progress,
            ways,
            checkpointing,
        )
        for batch in read_batches(data, model, template, max_length, sizes, seed):
            for comparison in bench.run(batch, exact=exact and len(batch) == sizes[0]):
                report.add(comparison)
    report.finish()


def read_batches(
    data: Path | None, model: str, template: str, max_length: int, sizes: Sequence[int], seed: int
) -> list[list[Group]]:
    """One typical batch for each size, from a ranked file or the examples shipped."""
    tokenizer = load_tokenizer(model)
    with resources.as_file(resources.files("tuna.data") / "examples" / "ranked_demo.jsonl") as shipped:
        records = read_records(data or shipped).records
    items, _ = tokenize_records(records, tokenizer, template=template, max_length=max_length, on_bad="skip")
    return [typical_batch([item.group for item in items], size, seed) for size in sizes]


if __name__ == "__main__":
    typer.run(main)
