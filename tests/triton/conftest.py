"""Tests of the Triton kernels: in the interpreter (``TRITON_INTERPRET=1``, as ``make test`` runs them) or on a GPU.

The interpreter is chosen when triton is imported, so these run in a pytest of their own and elsewhere are not
collected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuna_kernels.backends import triton as backend

if backend.why_not():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def patch_the_language_once_a_launch() -> None:
    """Triton's interpreter replaces the whole language anew at every call of a helper, most of its time: here it is
    replaced when a kernel is launched and put back when the launch ends."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    scopes: list[Any] = []

    class Launch:
        def restore(self) -> None:
            while scopes:
                scopes.pop().restore()

    class Helper:
        def restore(self) -> None:
            pass

    def once(function: Any) -> Any:
        if scopes:
            return Helper()
        scopes.append(patch(function))
        scopes.append(patch(tl.standard.max.fn))  # the library's own helpers reach the language as `core`
        return Launch()

    interpreter._patch_lang = once


if backend.is_interpreted() and not backend.why_not():
    patch_the_language_once_a_launch()
