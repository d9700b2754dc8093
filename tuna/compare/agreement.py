"""How far some tensors are from the right ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Error", "Results", "measure_errors"]

Results = Mapping[str, Tensor]
"""Tensors by name; a name `kind:detail` belongs to the kind before the colon."""


@dataclass(frozen=True)
class Error:
    """How far the results of one kind are from the oracle; None where a difference is not finite.

    `max_abs`: largest absolute difference. `max_rel`: largest, over the tensors of this kind, of
    max|a - o| / max|o|, and `worst` the tensor it was found in. `norm_rel`: ||a - o|| / ||o|| over all of them.
    """

    max_abs: float | None
    max_rel: float | None
    norm_rel: float | None
    worst: str = ""


def measure_errors(results: Results, oracle: Results) -> dict[str, Error]:
    """Distance of `results` from `oracle` (same names and shapes), in float64, one `Error` for each kind."""
    errors: dict[str, Error] = {}
    for kind in dict.fromkeys(name.partition(":")[0] for name in oracle):
        names = [name for name in oracle if name.partition(":")[0] == kind]
        max_abs, max_rel, worst, off, size = 0.0, 0.0, names[0], 0.0, 0.0
        for name in names:
            right = oracle[name].detach().double()
            wrong_by = results[name].detach().double() - right
            here, scale = _largest(wrong_by), _largest(right)
            relative = here / scale if scale and math.isfinite(here) else (math.inf if here else 0.0)
            if relative > max_rel:
                max_rel, worst = relative, name
            max_abs = max(max_abs, here)
            off, size = off + float(wrong_by.square().sum()), size + float(right.square().sum())
        norm_rel = (off / size) ** 0.5 if size else (math.inf if off else 0.0)
        errors[kind] = Error(_finite(max_abs), _finite(max_rel), _finite(norm_rel), worst)
    return errors


def _largest(values: Tensor) -> float:
    """Largest magnitude, infinite when any value is not finite, 0 when there is none."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return largest if math.isfinite(largest) else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
