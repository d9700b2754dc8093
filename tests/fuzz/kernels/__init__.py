"""Kernels: any shape, stride, type and scale, on every backend, against the reference in float64."""

from __future__ import annotations

import random

from tests.fuzz.kernels import attention, head, ranking, selective

SHORT_RUN = 30


def case(seed: int) -> None:
    """One call of one op, forward and backward, twice."""
    rng = random.Random(seed)
    rng.choice([head, head, selective, ranking, attention]).check(rng)
