"""Which settings must be the same as in the checkpoint, which may differ, and how differences are reported.

Settings come in four kinds. With a difference in `KIND` a checkpoint cannot be resumed. One in `FIXED` gives a run that
is neither the old one nor a new one (the position in the data is counted in micro-batches), so it needs
`allow_changes`. `UNTOLD` settings do not affect what is learned and are not reported. All others apply from the next
step on and are reported, for example the learning rate after a run stopped on a bad loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tuna.data.tokenization import TokenizedGroup

__all__ = ["Differences", "apply_schedule", "compare", "describe_arguments", "describe_data", "describe_model"]

KIND = ("adapter", "optim", "weights")
FIXED = (
    "adapter_settings", "base", "config", "data", "data_seed", "dtype", "length_penalty", "margin", "max_length",
    "metric_for_best_model", "mle_weight", "optim_args", "per_device_train_batch_size", "preset", "seed", "share",
    "template", "tokens_per_batch",
)  # fmt: skip
SCHEDULE = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate", "lr_scheduler_kwargs", "lr_scheduler_type",
    "max_steps", "num_train_epochs", "warmup_steps", "weight_decay",
)  # fmt: skip
UNTOLD = (
    "accelerator_config", "allow_changes", "average_tokens_across_devices", "dataloader_", "ddp_", "debug",
    "disable_tqdm", "do_", "eval_", "gradient_accumulation_steps", "greater_is_better", "hub_", "include_",
    "load_best_model_at_end", "local_rank", "log_", "logging_", "output_dir",
    "overwrite_", "per_device_eval_batch_size", "project", "push_to_hub", "report_to", "resume_from_checkpoint",
    "restore_callback_states_from_checkpoint", "run_name", "save_", "skip_memory_metrics", "torch_empty_cache_steps",
    "trackio_", "trust_checkpoint", "use_cpu",
)  # fmt: skip
# Schedules whose rate depends on what they have seen so far, not on the step alone.
STATEFUL = ("reduce_lr_on_plateau", "greedy")
# Fields of a model's configuration that do not affect its function, or change by loading, saving and training.
NO_FUNCTION = (
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "label2id", "output_", "return_dict",
    "torch_dtype", "transformers_version", "use_cache", "_",
)  # fmt: skip
SAMPLED = 64  # values of each frozen weight: enough to distinguish models

Settings = dict[str, Any]


@dataclass(frozen=True)
class Differences:
    """Differences between a checkpoint and a run, as lines that name the old and the new value.

    Attributes:
        kind: differences with which the checkpoint cannot be resumed.
        fixed: differences that need `allow_changes`.
        told: differences that are applied and reported.
        names: of the settings that differ.
    """

    kind: list[str]
    fixed: list[str]
    told: list[str]
    names: frozenset[str]


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """The settings that differ. A setting that only one side has is from another version and is ignored."""
    kind: list[str] = []
    fixed: list[str] = []
    told: list[str] = []
    names = [name for name in now if name in then and not name.startswith(UNTOLD) and _differ(then[name], now[name])]
    for name in names:
        lines = _lines(name, then[name], now[name])
        stateful = name == "lr_scheduler_type" and any(value in STATEFUL for value in (then[name], now[name]))
        (kind if name in KIND or stateful else fixed if name in FIXED else told).extend(lines)
    if now.get("lr_scheduler_type") in STATEFUL and "learning_rate" in names:
        told.remove(_lines("learning_rate", then["learning_rate"], now["learning_rate"])[0])
        kind.append(f"learning_rate: {then['learning_rate']} before and changed since by {now['lr_scheduler_type']}")
    return Differences(kind, fixed, told, frozenset(names))


def describe_arguments(arguments: Mapping[str, Any]) -> Settings:
    """The trainer's settings as JSON values; nested settings get names with a dot."""
    kept = {name: value for name, value in arguments.items() if not name.startswith(UNTOLD)}
    found: Settings = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and name != "lr_scheduler_kwargs":
            for key, item in value.items():
                add(f"{name}.{key}", item)
        else:
            found[name] = value

    for name, value in json.loads(json.dumps(kept, default=str)).items():
        add(name, value)
    return found


def describe_data(groups: Sequence[TokenizedGroup], sources: Mapping[str, Any]) -> Settings:
    """Digests of the training data, with and without regard to order, and its sources (for messages only)."""
    each = [_digest_of(group) for group in groups]
    order, content = hashlib.sha256(b"".join(each)), hashlib.sha256(b"".join(sorted(each)))
    named = json.loads(json.dumps(dict(sources), default=str))
    return {"groups": len(each), "order": order.hexdigest(), "content": content.hexdigest(), "from": named}


def describe_model(model: nn.Module) -> Settings:
    """What decides whether a checkpoint's weights fit a model and have the same meaning in it."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    shapes = {name: list(getattr(value, "ds_shape", value.shape)) for name, value in trained.items()}
    settings: Settings = {
        "weights": {"number": len(shapes), "digest": _digest(json.dumps(shapes, sort_keys=True).encode())},
        "dtype": sorted({str(value.dtype).removeprefix("torch.") for value in trained.values()}),
        "base": _sample(value for value in model.parameters() if not value.requires_grad),
    }
    configuration: Any = getattr(model, "config", None)
    if configuration is not None:
        values = json.loads(json.dumps(configuration.to_dict(), default=str))
        settings["config"] = {
            name: value
            for name, value in values.items()
            if not name.startswith(NO_FUNCTION) and not name.endswith("token_id")
        }
    adapters = getattr(model, "peft_config", None)
    settings["adapter"] = settings["adapter_settings"] = None
    if adapters:
        active: Any = adapters[getattr(model, "active_adapter", next(iter(adapters)))]
        targets = active.target_modules
        shape = {"type": str(active.peft_type), "rank": getattr(active, "r", None)}
        settings["adapter"] = {**shape, "targets": targets if isinstance(targets, str) else sorted(targets or ())}
        names = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "modules_to_save")
        settings["adapter_settings"] = {name: getattr(active, name, None) for name in names}
    return settings


def apply_schedule(optimizer: Any, scheduler: Any, fresh: Sequence[Mapping[str, Any]]) -> None:
    """Apply the settings of this run to an optimizer and its schedule that were just loaded.

    Args:
        optimizer: a torch optimizer with the parameter groups of the checkpoint.
        scheduler: at the checkpoint's step, with the functions of this run.
        fresh: the settings of each parameter group in this run.
    """
    for group, settings in zip(optimizer.param_groups, fresh, strict=True):
        group.update({name: value for name, value in settings.items() if name not in ("params", "lr")})
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return  # DeepSpeed's schedule computes its rates from its settings alone
    rates: list[Any] = [float(group.get("initial_lr", group["lr"])) for group in fresh]
    scheduler.base_lrs = rates
    now: list[Any] = [
        rate * shape(scheduler.last_epoch) for rate, shape in zip(rates, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, now, strict=True):
        group["lr"] = torch.full_like(group["lr"], rate) if torch.is_tensor(group["lr"]) else rate
    scheduler._last_lr = now


def _differ(then: Any, now: Any) -> bool:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        shared = [name for name in now if name in then and name != "from"]
        return any(_differ(then[name], now[name]) for name in shared)
    return bool(then != now)


def _lines(name: str, then: Any, now: Any) -> list[str]:
    if name == "data":
        return [_data_line(then, now)]
    if name == "base":
        return ["model: different weights under the adapter"]
    if name == "weights":
        return [f"weights: {then['number']} trained before, {now['number']} now, or with other names or shapes"]
    if name in ("config", "adapter_settings") and isinstance(then, Mapping) and isinstance(now, Mapping):
        prefix = "model." if name == "config" else ""
        changed = [key for key in now if key in then and then[key] != now[key]]
        return [f"{prefix}{key}: {_short(then[key])} before, {_short(now[key])} now" for key in changed]
    return [f"{name}: {_short(then)} before, {_short(now)} now"]


def _data_line(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before, after = then.get("from", {}), now.get("from", {})
    named = [
        f"{key}: {_short(before.get(key))} before, {_short(after.get(key))} now"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
    more = f" ({'; '.join(named)})" if named else ""
    if then["content"] == now["content"]:
        return f"data: the same {now['groups']:,} groups in another order{more}"
    what = "different ones now" if then["groups"] == now["groups"] else "now"
    return f"data: {then['groups']:,} groups before, {now['groups']:,} {what}{more}"


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def _digest_of(item: TokenizedGroup) -> bytes:
    """Digest of a group's tokens and ranks, not of its id nor of scores beyond their order."""
    group, digest = item.group, hashlib.sha256()
    order = np.asarray(group.ranks if group.scores is None else [-float(score) for score in group.scores])
    ranks = np.unique(order, return_inverse=True)[1] if order.ndim else np.zeros(len(group.responses))
    for part in (group.prompt, *group.responses, ranks):
        values = np.asarray(part, dtype=np.int64)
        digest.update(len(values).to_bytes(8, "little"))
        digest.update(values.tobytes())
    return digest.digest()


def _sample(frozen: Iterable[torch.Tensor]) -> str | None:
    """Digest of some values of each frozen weight; None if there are none, or if they are sharded."""
    digest, seen = hashlib.sha256(), False
    for value in frozen:
        if value.numel() == 0 or value.is_meta or hasattr(value, "ds_tensor") or hasattr(value, "placements"):
            continue
        seen = True
        flat = value.detach().reshape(-1)
        digest.update(flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].double().cpu().numpy().tobytes())
    return digest.hexdigest() if seen else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
