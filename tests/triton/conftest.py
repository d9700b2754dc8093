"""Tests of the Triton kernels: in the interpreter (``TRITON_INTERPRET=1``, as ``make test`` runs them) or on a GPU.

The interpreter is chosen when triton is imported, so these run in a pytest of their own and elsewhere are not
collected.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.triton.interpreter import multiply_in_one_order, patch_the_language_once_a_launch, round_bfloat16_to_nearest
from tuna_kernels.gpu import availability

if availability.why_not_here():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


if availability.is_interpreted() and not availability.why_not_here():
    patch_the_language_once_a_launch()
    multiply_in_one_order()
    round_bfloat16_to_nearest()
