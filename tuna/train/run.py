"""A training run from files to files, top to bottom: what `tuna train` does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from tuna.console.next import say_next
from tuna.console.preview import best_and_worst
from tuna.console.warnings import given_template, print_problems, warn
from tuna.data.notices import reversed_notice, sample_of
from tuna.data.records import Record, read_records
from tuna.data.split import split_records
from tuna.data.templates import save_template, saved_template
from tuna.data.tokenization import TokenizedGroup, token_stats
from tuna.models.loading import SMOLLM2, cache_folder, load_model
from tuna.score.metrics import ranking_metrics
from tuna.system.locks import hold
from tuna.system.writing import write_json
from tuna.train.config import TunaConfig
from tuna.train.curves import plot_log
from tuna.train.distributed import launched
from tuna.train.group_data import tokenized
from tuna.train.logs import LOG_FILE, JsonLines, default_reports
from tuna.train.outputs import check_content, check_place
from tuna.train.progress import TrainingProgress
from tuna.train.result import METRICS_FILE, PICTURE_FILE, remove_result, save_model
from tuna.train.run_settings import RunSettings
from tuna.train.tables import comparison, summary, total_steps
from tuna.train.trainer import TunaTrainer

LEAST_LINES = 5  # of the log, where there are as many steps


def run_training(run: RunSettings, settings: dict[str, Any], console: Console) -> dict[str, Any]:
    """Train, evaluate and save; returns what `metrics.json` holds.

    Args:
        run: model, data and what to do with them.
        settings: keyword arguments of `TunaConfig`, `output_dir` among them.
        console: where tables and progress go.

    Raises:
        ValueError, FileNotFoundError: settings, data or a model that cannot be used.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # it would cut through ours
    output = Path(settings["output_dir"]).expanduser()
    settings["output_dir"] = str(output)
    _check_resuming(run, settings)
    if launched()[0] > 0:
        return _run(run, settings, output, console)
    resume = run.resume or bool(settings.get("resume_from_checkpoint"))
    check_place(output, _inputs(run))
    with hold(output):
        check_content(output, resume=resume, overwrite=run.overwrite)
        return _run(run, settings, output, console)


def _run(run: RunSettings, settings: dict[str, Any], output: Path, console: Console) -> dict[str, Any]:
    """Train, evaluate and save in a folder locked for this run."""
    settings = settings | {"template": _template(run, settings, output, console)}
    config = _trainer_config(run, settings)
    train_records, eval_records = read_data(run, config, console)
    console.print(best_and_worst(train_records, 3))
    _confirm(run, console)
    with console.status(f"loading {run.model} …"):
        model, tokenizer = load_model(run.model, dtype=getattr(torch, run.dtype), load_in_4bit=run.load_in_4bit)
    with console.status(f"tokenising {len(train_records) + len(eval_records):,} records …"):
        train = tokenized(train_records, config, tokenizer)
        held_out = tokenized(eval_records, config, tokenizer) if eval_records else None
    resume = config.resume_from_checkpoint or run.resume or None
    trainer = TunaTrainer(_with_adapter(model, run), config, train, held_out, tokenizer)
    trainer.remove_callback(PrinterCallback)
    if not run.resume and not (held_out and run.eval_first):
        with console.status("ranking a sample of the data …"):
            warn(console, reversed_notice(_base_accuracy(trainer, train)))
    trainer.add_callback(TrainingProgress(console))
    trainer.add_callback(JsonLines(output / LOG_FILE, fresh=not resume))
    trainer.overwrite = run.overwrite
    trainer.sources = {name: getattr(run, name) for name in ("model", "data", "format", "limit", "eval_fraction")}
    stats = token_stats(train, batch_groups=config.per_device_train_batch_size)
    console.print(summary(trainer, stats, held_out))
    if "logging_steps" not in settings:
        config.logging_steps = max(1, min(config.logging_steps, total_steps(trainer) // LEAST_LINES))

    if trainer.is_world_process_zero():
        save_template(output, config.template)  # now, so that a run that was stopped has it to resume
    before = trainer.evaluate() if held_out and run.eval_first and not config.eval_on_start else None
    if before is not None and not resume:
        warn(console, reversed_notice(before.get("eval_rank/accuracy")))
    if run.overwrite and trainer.is_world_process_zero():
        remove_result(output)  # now, so that a run that is stopped is not taken for the earlier one
    trainer.train(resume_from_checkpoint=resume)
    if config.eval_on_start:
        before = next((line for line in trainer.state.log_history if "eval_loss" in line), None)
    after = trainer.evaluate() if held_out else None
    save_model(trainer, output, tokenizer)
    metrics = {
        "settings": asdict(run) | settings,
        "data": asdict(stats),
        "steps": trainer.state.global_step,
        "before": before,
        "after": after,
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        write_json(output / METRICS_FILE, metrics)
        plot_log(output / PICTURE_FILE, trainer.state.log_history)
    if after is not None:
        console.print(comparison(before, after))
    console.print(f"model, {METRICS_FILE} and {PICTURE_FILE} are in {output}", highlight=False)
    say_next(console, "score", model=output, data=run.eval_data or "DATA")
    return metrics


def _check_resuming(run: RunSettings, settings: Mapping[str, Any]) -> None:
    """Check that a run either resumes or starts, and that options for resuming come with `resume`."""
    checkpoint = settings.get("resume_from_checkpoint")
    if run.resume and run.overwrite:
        raise ValueError("resume and overwrite are both given: go on with the run, or begin again in its place")
    if run.resume and checkpoint:
        raise ValueError(
            f"resume and resume_from_checkpoint = {checkpoint} are both given: go on from the last checkpoint, or from "
            "that one"
        )
    for name in ("allow_changes", "trust_checkpoint"):
        if settings.get(name) and not run.resume and not checkpoint:
            raise ValueError(f"{name} would have no effect: this run goes on from no checkpoint (resume)")


def _inputs(run: RunSettings) -> dict[str, Path]:
    """What the run reads, where that is files."""
    model = cache_folder() / SMOLLM2 if run.model == SMOLLM2 else Path(run.model).expanduser()
    inputs = {"model": model, "data": Path(run.data).expanduser()}
    if run.eval_data is not None:
        inputs["eval_data"] = Path(run.eval_data).expanduser()
    return inputs


def _template(run: RunSettings, settings: Mapping[str, Any], output: Path, console: Console) -> str:
    """The template to train with: as given, of the run that is resumed, of the model's own training, or none.

    Raises:
        ValueError: a run is resumed with another template.
    """
    given, checkpoint = settings.get("template"), settings.get("resume_from_checkpoint")
    source = output if run.resume else Path(checkpoint).expanduser() if checkpoint else None
    saved = None if source is None else saved_template(source) or saved_template(source.parent)
    if saved is not None and given not in (None, saved):
        raise ValueError(f"template = {given!r}, but {source} was trained with {saved!r}: leave it out to resume")
    if saved is None:
        return given_template(console, given, run.model, None)
    console.print(f"template {saved!r}: that of the run resumed")
    return saved


def _base_accuracy(trainer: TunaTrainer, train: Sequence[TokenizedGroup]) -> float | None:
    """Share of the pairs in a sample that the model ranks as the data does, before training."""
    sample = sample_of(train)
    if not sample or trainer.args.deepspeed or trainer.args.fsdp:  # sharded weights are there once training starts
        return None
    return ranking_metrics(trainer.score(sample)).get("rank/accuracy")


def _trainer_config(run: RunSettings, settings: dict[str, Any]) -> TunaConfig:
    held_out = run.holds_out
    if "eval_steps" in settings and held_out:
        settings.setdefault("eval_strategy", "steps")
    for name in ("eval_strategy", "eval_steps", "eval_on_start"):
        if not held_out and settings.get(name) not in (None, "no", False):
            raise ValueError(f"{name} needs held-out data: give eval_data or eval_fraction")
    if settings.get("do_train") is False:
        raise ValueError("do_train = False would have no effect: this command trains; use tuna score")
    if settings.get("disable_tqdm") is False:
        raise ValueError("disable_tqdm = False would have no effect: bars and lines are tuna's own")
    # Sharded weights are there to evaluate only once DeepSpeed has started, which training does.
    on_start = bool(settings.get("deepspeed")) and held_out and run.eval_first
    defaults = {"report_to": default_reports(), "eval_on_start": on_start}
    try:
        return TunaConfig(**{**defaults, **settings, "disable_tqdm": True})  # bars and lines: tuna.train.progress
    except (TypeError, AttributeError, LookupError, NotImplementedError) as error:  # of values transformers looks into
        raise ValueError(f"settings that cannot be used: {error}") from error


def read_data(run: RunSettings, config: TunaConfig, console: Console) -> tuple[list[Record], list[Record]]:
    """Training and held-out records."""
    with console.status(f"reading {run.data} …"):
        found = read_records(run.data, format=run.format, on_bad=config.on_bad)
        held_out = read_records(run.eval_data, format=run.format, on_bad=config.on_bad) if run.eval_data else None
    print_problems(console, [*found.problems, *(held_out.problems if held_out else [])])
    records = found.records[: run.limit]
    if not records:
        raise ValueError(f"data = {run.data!r} holds no records")
    if held_out is not None and not held_out.records:
        raise ValueError(f"eval_data = {run.eval_data!r} holds no records")
    if held_out is not None or run.eval_fraction is None:
        return records, held_out.records if held_out else []
    return split_records(records, run.eval_fraction, config.seed)


def _confirm(run: RunSettings, console: Console) -> None:
    """On a terminal, ask whether the order of the responses is right."""
    if run.yes or not console.is_terminal or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return
    if console.input("Are these the right way round? [Y/n] ").strip().lower() not in ("", "y", "yes"):
        raise ValueError("stopped: give the records with scores (higher is better) or ranks (0 or 1 is best)")


def _with_adapter(model: PreTrainedModel, run: RunSettings) -> torch.nn.Module:
    if run.lora_r == 0:
        return model
    from peft import LoraConfig, get_peft_model

    targets = run.lora_targets if run.lora_targets == "all-linear" else run.lora_targets.split(",")
    adapter = LoraConfig(
        r=run.lora_r,
        lora_alpha=2 * run.lora_r if run.lora_alpha is None else run.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    adapted: torch.nn.Module = get_peft_model(model, adapter)
    if not adapter.base_model_name_or_path:
        adapter.base_model_name_or_path = run.model  # of a model that is from no folder: `tuna export` asks for it
    return adapted
