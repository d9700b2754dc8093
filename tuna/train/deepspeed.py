"""DeepSpeed under `TunaTrainer`: reading its settings, starting it, and checking that it is in use.

DeepSpeed is not wrapped: settings are DeepSpeed's own, as a mapping or a JSON or YAML file (YAML allows comments).
This module avoids known problems:

- On a machine without an accelerator, DeepSpeed must be configured before its first import, and accelerate may
  silently not use DeepSpeed; `check_engine` checks on all ranks that it is in use.
- DeepSpeed compiles helpers on first use. The one for CPU inference takes minutes and is never called in training:
  it is marked as unavailable. Adam on the CPU is compiled by one process per node at a time, under a lock that
  the system releases when a process is killed (the lock file of torch's own builder remains and hangs every later
  run).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from tuna.models.integrity import LATEST_UNIVERSAL
from tuna.system.settings_text import read_settings_file

MINIMUM = "0.19.4"
"""Older versions lose gradients with offload and several backwards (0.18) or fail on frozen parameters (0.19.2)."""

Settings = dict[str, Any]
MAPPINGS = (
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "bf16",
    "fp16",
    "optimizer.params",
    "scheduler",
)


def read_settings(source: str | os.PathLike[str] | Mapping[str, Any]) -> Settings:
    """DeepSpeed settings from a mapping, or from a .json, .yaml or .yml file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, or unsupported settings; the message names the key.
    """
    if isinstance(source, Mapping):
        where, content = "deepspeed", dict(source)
    else:
        where, path = str(source), Path(source).expanduser()
        content = read_settings_file(path, "DeepSpeed settings file")  # JSON is YAML
    _check(where, content)
    return content


def _check(where: str, settings: Settings) -> None:
    for path in MAPPINGS:
        part: Any = settings
        for key in path.split("."):
            part = part.get(key, {})
            if not isinstance(part, Mapping):
                raise ValueError(f"{where}: {path} = {part!r} must be keys and values")
    stage = stage_of(settings)
    if stage not in (1, 2, 3):
        raise ValueError(f"{where}: zero_optimization.stage = {stage!r} is not one of 1, 2, 3")
    if enabled(settings, "fp16") and not torch.accelerator.is_available():
        raise ValueError(f"{where}: fp16.enabled is not supported without a GPU; use bf16 or float32")
    if "gradient_clipping" not in settings:
        raise ValueError(
            f"{where}: gradient_clipping is missing: DeepSpeed would then clip at 1.0 and ignore max_grad_norm; "
            'set "auto" (max_grad_norm) or a number (0: off)'
        )
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if settings.get(key, "auto") != "auto":
            raise ValueError(
                f"{where}: {key} = {settings[key]!r} must be omitted or 'auto': batches are set by "
                "per_device_train_batch_size (groups) or tokens_per_batch, and gradient_accumulation_steps"
            )


def stage_of(settings: Mapping[str, Any]) -> Any:
    """The ZeRO stage, 0 if none is given."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def enabled(settings: Mapping[str, Any], precision: str) -> bool:
    """Whether `bf16` or `fp16` is explicitly enabled ("auto" follows the trainer's setting)."""
    return settings.get(precision, {}).get("enabled") is True


def prepare(settings: Settings) -> Settings:
    """Set up DeepSpeed in this process and complete `settings`; call before anything imports DeepSpeed.

    Raises:
        ImportError: DeepSpeed is missing or too old.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("deepspeed is not installed: pip install 'tuna-kernels[deepspeed]'") from error
    if Version(deepspeed.__version__) < Version(MINIMUM):
        raise ImportError(f"deepspeed {deepspeed.__version__} is too old: {MINIMUM} or later is needed")
    # DeepSpeed's table of what this machine can compile; an entry set to False is not compiled. This one is for
    # inference on CPUs only and takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # no launcher: DeepSpeed and accelerate expect the environment of a single rank
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", **settings}
    if needs_cpu_adam(settings):
        build_cpu_adam()
    return settings


def needs_cpu_adam(settings: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed will use its own CPU Adam, which must be compiled."""
    device = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    optimizer = settings.get("optimizer", {})
    ours = optimizer.get("params", {}).get("torch_adam", False) or not settings.get("zero_force_ds_cpu_optimizer", True)
    return device != "none" and not ours and optimizer.get("type", "Adam").lower() in ("adam", "adamw")


def build_cpu_adam() -> None:
    """Compile and load DeepSpeed's CPU Adam, one process per node at a time."""
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    with build_lock(root, CPUAdamBuilder.NAME):
        CPUAdamBuilder().load(verbose=False)


@contextmanager
def build_lock(root: Path, name: str) -> Iterator[None]:
    """A lock on compiling the extension `name` under `root`, for one process at a time.

    The operating system releases the lock of a killed process. Torch's own builder uses a lock file, which a killed
    process leaves behind and every later one waits for; the holder of this lock removes it.
    """
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    with (root / f"tuna_{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in root.glob(f"**/{name}/lock"):
            with suppress(FileNotFoundError):
                stale.unlink()
        yield


def check_engine(wrapped: Any, world_size: int) -> None:
    """Check that `wrapped` is a DeepSpeed engine over `world_size` ranks.

    Raises:
        RuntimeError: accelerate does not use DeepSpeed, or the numbers of ranks differ.
    """
    import deepspeed

    if not isinstance(wrapped, deepspeed.DeepSpeedEngine):
        raise RuntimeError(
            f"DeepSpeed was requested but is not in use: the model is wrapped in {type(wrapped).__name__}. Start with "
            "torchrun, deepspeed or accelerate launch"
        )
    if wrapped.world_size != world_size:
        raise RuntimeError(f"DeepSpeed has {wrapped.world_size} ranks, the trainer {world_size}")


def on_nvme(settings: Mapping[str, Any]) -> bool:
    """Whether states or weights are offloaded to NVMe, where DeepSpeed cannot load a universal checkpoint."""
    parts = ("offload_optimizer", "offload_param")
    return any(settings.get("zero_optimization", {}).get(part, {}).get("device") == "nvme" for part in parts)


def mend_universal(engine: Any, checkpoint: str | os.PathLike[str]) -> None:
    """Correct two errors of DeepSpeed's ZeRO-3 in loading a universal checkpoint (seen in 0.19.8).

    It shares one `step` tensor between the states of all sub-groups, so that each update advances it once per
    sub-group, and applies the settings of the first parameter group (its weight decay) to all groups. Both change the
    following steps. Other stages are not changed. Called under `trust.loading`.
    """
    if engine.zero_optimization_stage() != 3:
        return
    optimizer = engine.optimizer.optimizer
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    tag = (Path(checkpoint) / LATEST_UNIVERSAL).read_text("utf-8").strip()
    saved = torch.load(Path(checkpoint) / tag / "zero" / "optimizer_state.pt", weights_only=False, map_location="cpu")
    for group, settings in zip(optimizer.param_groups, saved["optimizer_state_dict"]["param_groups"], strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})
