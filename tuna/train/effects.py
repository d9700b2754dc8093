"""Settings without effect in a run: an error, or a warning if they may be in a file shared with other runs.

One table each. A setting is idle if it was given (its value is not the default) and its condition holds.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from importlib.util import find_spec
from typing import Any

import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

__all__ = ["check_effects", "check_mappings"]

logger = logging.getLogger(__name__)

# Settings of transformers' `Trainer` that have no meaning here, by reason.
OURS = {
    "the loss is always divided by counts over all devices": ("average_tokens_across_devices",),
    "a pass over a tree uses no cache": ("use_cache",),
    "evaluation keeps scores and no predictions": (
        "prediction_loss_only",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "eval_accumulation_steps",
        "include_for_metrics",
        "batch_eval_metrics",
    ),
    "a batch is a packed tree, it has no columns": ("label_names", "length_column_name"),
    "batches are packed in a separate thread": (
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_in_order",
        "dataloader_multiprocessing_context",
    ),
    "SIGTERM always saves a checkpoint": ("enable_jit_checkpoint",),
    "launchers set it in LOCAL_RANK": ("local_rank",),
    "use tuna score": ("do_predict",),
}
PACKED = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")
MAPPINGS = (
    "accelerator_config",
    "deepspeed",
    "fsdp_config",
    "lr_scheduler_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
    "liger_kernel_config",
)
OF_HUB = ("hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision")
OF_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
TWO_PHASE = ("candidates_per_pass", "skip_inactive")
OF_RANKS = (
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_timeout",
)
OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
NO_ADAM = ("sgd", "adafactor", "adagrad", "rmsprop")
NO_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")
NO_WARMUP = ("constant", "greedy", "reduce_lr_on_plateau")
WITH_TARGETS = ("galore", "apollo", "lomo", "layerwise")
NAMED_RUNS = ("wandb", "mlflow", "comet_ml", "swanlab", "trackio")
# Packages of `report_to` services whose names differ from the service's.
SERVICES = {"azure_ml": "azureml", "dagshub": "dagshub", "flyte": "flytekit"}


def check_effects(config: Any) -> None:
    """Check a `tuna.train.config.TunaConfig` for settings without effect.

    Raises:
        ValueError: a setting without effect, or one that needs a missing package; the message names it and the reason.
    """
    for name, reason in _idle(config):
        if is_given(config, name):
            raise ValueError(f"{_shown(config, name)} would have no effect: {reason}")
    for name, reason in _perhaps_idle(config):
        if is_given(config, name):
            logger.warning("%s has no effect in this run: %s", _shown(config, name), reason)
    _check_loaders(config)
    _check_packages(config)
    _check_schedule(config)
    _check_names(config)
    _check_numbers(config)


def _shown(config: Any, name: str) -> str:
    """A setting with its value, as the user writes it; a token without its value."""
    value = getattr(config, name)
    return name if name == "hub_token" else f"{name} = {getattr(value, 'value', value)!r}"


def check_mappings(config: Any) -> None:
    """Reject values that transformers would treat as a file descriptor and wait for, or fail on much later.

    Raises:
        ValueError: a setting is neither a mapping nor text (a file, or JSON).
    """
    for name in MAPPINGS:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, Mapping | str | AcceleratorConfig | os.PathLike):
            raise ValueError(f"{name} = {value!r} must be keys and values")


def is_given(config: Any, name: str) -> bool:
    """Whether the value of a field differs from its default."""
    field = next((item for item in fields(config) if item.name == name), None)
    if field is None:  # of another version of transformers
        return False
    default: Any = field.default_factory() if field.default_factory is not MISSING else field.default
    return bool(getattr(config, name) != default)


def _idle(config: Any) -> Iterator[tuple[str, str]]:
    """Settings without effect in this run, each with the reason."""
    for reason, names in OURS.items():
        yield from ((name, reason) for name in names)
    if config.device.type == "cpu":
        yield "fp16", "training in float16 is not supported on the CPU; use bf16 or float32"
        yield "torch_empty_cache_steps", "there is no GPU cache to empty"
    if config.tokens_per_batch is not None:
        yield "auto_find_batch_size", "tokens_per_batch decides how many groups a batch holds"
    for name, strategy in (("logging_steps", "logging"), ("eval_steps", "eval"), ("save_steps", "save")):
        if getattr(config, f"{strategy}_strategy") != "steps":
            yield name, f"{strategy}_strategy = {str(getattr(config, f'{strategy}_strategy').value)!r}"
    if config.eval_strategy == "no":
        names = ("do_eval", "load_best_model_at_end", "eval_delay", "metric_for_best_model", "greater_is_better")
        yield from ((name, "nothing is evaluated during training (eval_strategy)") for name in names)
    if config.metric_for_best_model is None:
        yield "greater_is_better", "metric_for_best_model is not given"
    if config.save_strategy == "no":
        yield from (
            (name, "no checkpoints are saved (save_strategy)") for name in ("save_total_limit", "save_only_model")
        )
    if not config.gradient_checkpointing:
        names = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
        yield from ((name, "gradient_checkpointing is off") for name in names)
    if not config.use_liger_kernel:
        yield "liger_kernel_config", "use_liger_kernel is off"
    if not config.fsdp:
        yield "fsdp_config", "fsdp is off"
    if not config.push_to_hub:
        yield from ((name, "push_to_hub is off") for name in OF_HUB)
    if "trackio" not in config.report_to:
        yield from ((name, "report_to does not name trackio") for name in OF_TRACKIO)
    optimizer = "adamw_torch" if config.kahan else str(getattr(config.optim, "value", config.optim))
    if any(part in optimizer for part in NO_ADAM):
        yield from ((name, f"optim = {optimizer!r} is not Adam") for name in OF_ADAM)
    if optimizer in NO_ARGUMENTS:
        yield "optim_args", f"optim = {optimizer!r} has no arguments"
    schedule = str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type))
    if schedule in NO_WARMUP and config.warmup_steps:  # 0 is equivalent
        yield "warmup_steps", f"lr_scheduler_type = {schedule!r} has no warm-up"
    if not any(part in optimizer for part in WITH_TARGETS):
        yield "optim_target_modules", f"optim = {optimizer!r} updates all weights alike"


def _perhaps_idle(config: Any) -> Iterator[tuple[str, str]]:
    """Settings without effect in this run that are common in files together with what overrides them."""
    if config.max_steps > 0:
        yield "num_train_epochs", f"max_steps = {config.max_steps} decides"
    if config.tokens_per_batch is not None:
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
        yield from ((name, "tokens_per_batch decides how many groups a batch holds") for name in sizes)
    if config.memory == "one_pass":
        yield from ((name, "it is for two phases, and memory = 'one_pass'") for name in TWO_PHASE)
    if config.world_size == 1:
        yield from ((name, "there is one process") for name in OF_RANKS)
    if not any(name in config.report_to for name in NAMED_RUNS):
        yield "run_name", f"report_to has none of {', '.join(NAMED_RUNS)}"


def _check_packages(config: Any) -> None:
    for service in config.report_to:
        if not isinstance(service, str):
            raise ValueError(f"report_to = {service!r} must be a name, or a list of names")
        if service == "kubeflow":  # added by transformers inside a Kubeflow job; needs no package
            continue
        if service == "tensorboard":
            there = find_spec("tensorboard") or find_spec("tensorboardX")
        else:
            there = find_spec(SERVICES.get(service, service).partition(".")[0])
        if there is None and service in _services():
            raise ValueError(
                f"report_to = {service!r} needs a package that is missing: pip install {_package(service)}"
            )
        if service not in _services():
            raise ValueError(f"report_to = {service!r} is not one of {', '.join(_services())}")
    if config.use_liger_kernel:
        if find_spec("liger_kernel") is None:
            raise ValueError("use_liger_kernel needs a package that is missing: pip install liger-kernel")
        if config.device.type == "cpu":
            raise ValueError("use_liger_kernel = True needs a GPU: its kernels are Triton's")


def _check_numbers(config: Any) -> None:
    """Reject numbers that transformers treats as "not given" or that lead to an endless loop."""
    if config.max_steps == 0 or config.max_steps < -1:
        raise ValueError(f"max_steps = {config.max_steps} must be at least 1 (-1: num_train_epochs decides)")
    if config.max_steps < 0 and config.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs = {config.num_train_epochs} must be above 0")
    for name in ("logging_steps", "save_steps", "eval_steps"):
        if getattr(config, f"{name.partition('_')[0]}_strategy") == "steps" and getattr(config, name) <= 0:
            raise ValueError(f"{name} = {getattr(config, name)} must be above 0")
    for name in ("learning_rate", "weight_decay"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ValueError(f"{name} = {getattr(config, name)} must be a finite number, at least 0")
    if not 0 <= config.max_grad_norm < float("inf"):
        raise ValueError(f"max_grad_norm = {config.max_grad_norm} must be a finite number, at least 0 (0: off)")
    if config.save_total_limit is not None and config.save_total_limit < 1:
        raise ValueError(f"save_total_limit = {config.save_total_limit} must be at least 1")


def _check_names(config: Any) -> None:
    """Reject unknown names that transformers and torch would look up only later."""
    allowed: dict[str, Any] = dict.fromkeys(("log_level", "log_level_replica"), trainer_log_levels)
    values = {name: getattr(config, name) for name in allowed}
    compiling = config.compile_options or {}
    if "mode" in compiling:
        allowed["torch_compile_mode"] = ["default", *torch._inductor.list_mode_options()]
        values["torch_compile_mode"] = compiling["mode"]
    if "backend" in compiling:
        allowed["torch_compile_backend"] = torch._dynamo.list_backends(None)
        values["torch_compile_backend"] = compiling["backend"]
    for name, value in values.items():
        if value not in allowed[name]:
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(allowed[name])}")


def _services() -> tuple[str, ...]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return tuple(INTEGRATION_TO_CALLBACK)


def _package(service: str) -> str:
    return {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow", "flyte": "flytekit"}.get(service, service)


def _check_schedule(config: Any) -> None:
    """Reject arguments that the schedule does not accept, at the start rather than during the run."""
    given = config.lr_scheduler_kwargs
    if not given:
        return
    if not isinstance(given, dict):
        raise ValueError(f"lr_scheduler_kwargs = {given!r} must be keys and values")
    name = config.lr_scheduler_type
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[name]
    taken = inspect.signature(schedule).parameters
    own = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    known = [key for key in taken if key not in own]
    for key in given:
        if key not in known and "kwargs" not in taken:
            possible = ", ".join(known) or "none"
            raise ValueError(f"lr_scheduler_kwargs has {key!r}; the schedule {name.value!r} accepts {possible}")


def _check_loaders(config: Any) -> None:
    """Reject settings of accelerate's loaders, which are not used."""
    settings = config.accelerator_config
    for name in PACKED:
        if settings is not None and is_given(settings, name):
            raise ValueError(
                f"accelerator_config: {name} = {getattr(settings, name)!r} would have no effect: batches are planned "
                "for all ranks"
            )
