"""Tuna: instruction tuning with ranked responses (arXiv 2310.13385), on the kernels of `tuna_kernels`.

Importing it is cheap: torch, transformers and the names below are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuna.data.records import Record, read_records
    from tuna.models.loading import load_model
    from tuna.train.config import TunaConfig
    from tuna.train.trainer import TunaTrainer

__version__ = "0.1.0"
__all__ = ["Record", "TunaConfig", "TunaTrainer", "__version__", "load_model", "read_records"]

_HOME = {
    "Record": "tuna.data.records",
    "TunaConfig": "tuna.train.config",
    "TunaTrainer": "tuna.train.trainer",
    "load_model": "tuna.models.loading",
    "read_records": "tuna.data.records",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
