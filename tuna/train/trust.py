"""Loading files that somebody else may have written: tensors and plain values, never code.

A pickle is a program. Transformers and peft load theirs with `weights_only`; DeepSpeed does not, in its engine, in
its converters and in their worker processes alike. Torch has a switch for all of them, `FORCE`, and takes a list of
the classes of DeepSpeed's that its checkpoints hold.
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
    """The classes that DeepSpeed writes into its checkpoints beside tensors: numbers and names in attributes."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def tensors_only(*, deepspeed: bool = False) -> Iterator[None]:
    """Within, and in child processes, `torch.load` runs no code, whatever its caller asks for."""
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
    """Load a checkpoint within, without running code of its own unless `trust` is given.

    Args:
        source: the checkpoint.
        trust: let it run code.
        deepspeed: whether DeepSpeed wrote it.

    Raises:
        CheckpointError: it holds code.
    """
    from tuna.models.integrity import CheckpointError

    try:
        if not trust:
            _check_sharded(source)
        with nullcontext() if trust else tensors_only(deepspeed=deepspeed):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{source} cannot be loaded as tensors and plain values ({_short(str(error))}): what else it holds may run "
            "code. If you know who wrote it, give --trust-checkpoint"
        ) from error


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Read files of a checkpoint within: one that cannot be read becomes an error that names the checkpoint.

    Raises:
        CheckpointError: a file is damaged, or is not what its name says.
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
    """Reads the table of contents of a checkpoint in shards (FSDP's), which torch reads as any pickle."""

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
    """Torch explains itself at length: its first lines, as one."""
    line = " ".join(text.split())
    for start in ("WeightsUnpickler error:", "Unsupported global:"):
        if start in line:
            line = line[line.index(start) :].removeprefix("WeightsUnpickler error:").strip()
    return line if len(line) <= 200 else line[:199] + "…"
