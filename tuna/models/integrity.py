"""Integrity check of models on disk that are checkpoints of Tuna."""

from __future__ import annotations

from pathlib import Path

from tuna.system import manifest

__all__ = ["LATEST_UNIVERSAL", "MARKER", "UNIVERSAL", "CheckpointError", "check_model", "is_universal"]

MARKER = "complete.json"
"""The list of a checkpoint's files with sizes and digests; written last."""
UNIVERSAL, LATEST_UNIVERSAL = "universal.json", "latest_universal"
"""What DeepSpeed's conversion adds to a checkpoint: our list of its files, and DeepSpeed's own pointer."""
OF_MODEL = (".jinja", ".json", ".safetensors")


class CheckpointError(OSError):
    """A checkpoint is damaged, could not be written or cannot be resumed."""


def check_model(folder: Path) -> None:
    """Check that the files of a model are unchanged if it is a checkpoint of Tuna; optimizer files are not hashed.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if (folder / MARKER).is_file():
        wrong = manifest.fault(folder, MARKER, apart=is_universal, hashed=lambda place: Path(place).suffix in OF_MODEL)
        if wrong is not None:
            raise CheckpointError(wrong)


def is_universal(place: str) -> bool:
    """Whether a file of a checkpoint, by its path, was added by DeepSpeed's conversion and is in another list."""
    return place in (UNIVERSAL, LATEST_UNIVERSAL) or place.partition("/")[0].endswith("_universal")
