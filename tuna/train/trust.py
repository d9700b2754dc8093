"""Loading untrusted files: tensors and plain values, never code.

A pickle can run code. Transformers and peft load theirs with `weights_only`; DeepSpeed does not, neither in its engine
nor in its converters and their worker processes. Torch has an environment variable for all of them (`FORCE`) and
accepts a list of allowed classes: here those in DeepSpeed's checkpoints.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

__all__ = ["allow_deepspeed", "loading", "reading", "tensors_only"]

METADATA = ".metadata"
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def allow_deepspeed() -> list[Any]:
    """The classes in DeepSpeed's checkpoints other than tensors: their attributes are numbers and names."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def tensors_only(*, deepspeed: bool = False) -> Iterator[None]:
    """A context in which `torch.load` runs no code, whatever its arguments; also in child processes."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(allow_deepspeed() if deepspeed else []):
            yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def loading(source: Path, *, trust: bool, deepspeed: bool = False) -> Iterator[None]:
    """A context for loading a checkpoint, which runs code in it only if `trust` is given.

    Args:
        source: the checkpoint.
        trust: let it run code.
        deepspeed: whether DeepSpeed wrote it.

    Raises:
        CheckpointError: it contains code.
    """
    from tuna.models.integrity import CheckpointError

    try:
        if not trust:
            _check_sharded(source)
        with nullcontext() if trust else tensors_only(deepspeed=deepspeed):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{source} cannot be loaded as tensors and plain values ({_short(str(error))}): its other content may run "
            "code. If you trust its author, give --trust-checkpoint"
        ) from error


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """A context for reading files of a checkpoint; read errors become errors that name the checkpoint.

    Raises:
        CheckpointError: a file is damaged or has another format than its name says.
    """
    from safetensors import SafetensorError

    from tuna.models.integrity import CheckpointError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, EOFError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {_short(str(error)) or type(error).__name__}") from error


class _Metadata(pickle.Unpickler):
    """Reads the metadata of a sharded (FSDP) checkpoint, which torch would load as an unrestricted pickle."""

    def find_class(self, module: str, name: str) -> Any:
        plain = (module, name) in {
            ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        }  # fmt: skip
        entry = module == "torch.distributed.checkpoint.metadata" and "." not in name and name.lstrip("_")[:1].isupper()
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if plain or dtype or entry:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"Unsupported global: {module}.{name} in {METADATA}")


def _check_sharded(source: Path) -> None:
    for path in source.rglob(METADATA):
        with path.open("rb") as file:
            _Metadata(file).load()


def _short(text: str) -> str:
    """The first lines of torch's long explanations, as one line."""
    line = " ".join(text.split())
    for start in ("WeightsUnpickler error:", "Unsupported global:"):
        if start in line:
            line = line[line.index(start) :].removeprefix("WeightsUnpickler error:").strip()
    return line if len(line) <= 200 else line[:199] + "…"
