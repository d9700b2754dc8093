"""Tests of the Triton kernels: in the interpreter (``TRITON_INTERPRET=1``, as ``make test`` runs them) or on a GPU.

The interpreter is chosen when triton is imported, so these run in a pytest of their own and elsewhere are not
collected.
"""

from __future__ import annotations

from tuna_kernels.backends import triton as backend

if backend.why_not():
    collect_ignore_glob = ["test_*.py"]
