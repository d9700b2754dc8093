"""Which copy of the package Python took, where there are two."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def hidden_copy() -> Path | None:
    """The installed package that this one hides: Python started in a checkout, after `pip install .`, takes the
    checkout's, which has no native extension."""
    for entry in sys.path:
        other = Path(entry or ".", PACKAGE.name).resolve()
        if other != PACKAGE and (other / "__init__.py").is_file():
            return other
    return None


def has_extension(package: Path) -> bool:
    """Whether a copy of the package has native code for this Python."""
    return any((package / "native" / f"_cpu{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


def shadowing() -> str:
    """ "" unless this copy has no native extension and hides an installed one that has: what to do then."""
    other = hidden_copy()
    if other is None or has_extension(PACKAGE) or not has_extension(other):
        return ""
    return (
        f"Python took the checkout {PACKAGE}, which has no native extension, and not the package installed in {other}: "
        "start Python in another folder, or install the checkout itself (pip install --editable .)"
    )


def why_no_extension(error: ImportError) -> str:
    """The reason and the remedy, where importing the extension failed."""
    if reason := shadowing():
        return reason
    others = sorted(path.name for path in PACKAGE.glob("native/_cpu.*") if path.suffix in (".so", ".pyd"))
    if others and not has_extension(PACKAGE):
        return f"the native extension was built for another Python ({', '.join(others)}): install again with this one"
    return f"the native extension _cpu is not there ({error}); was there a C++ compiler when it was installed?"


@cache
def warn_of_shadowing() -> None:
    """Once a process."""
    if reason := shadowing():
        warnings.warn(reason, stacklevel=4)
