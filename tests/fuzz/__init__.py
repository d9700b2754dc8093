"""Fuzzers: random cases of what the product must hold, each found again from its seed.

    python -m tests.fuzz --seconds 60 --seed 0 [--only kernels]        # or: make fuzz SECONDS=60

A module (or package) in this folder that has a function ``case(seed: int) -> None`` is a fuzzer: it draws one case
from the seed and raises ``AssertionError``, with a message that describes the case, where a law is broken. Any other
exception that escapes is a fault too. ``SHORT_RUN`` says how many cases the test suite runs (default 10).
"""
