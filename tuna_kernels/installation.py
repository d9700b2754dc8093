"""Which copy of the package Python imported, if there are two."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def hidden_copy() -> Path | None:
    """The installed package hidden by this one: started in a checkout, after `pip install .`, Python imports the
    checkout's package, which has no native extension."""
    for entry in sys.path:
        other = Path(entry or ".", PACKAGE.name).resolve()
        if other != PACKAGE and (other / "__init__.py").is_file():
            return other
    return None


def has_extension(package: Path) -> bool:
    """Whether a copy of the package has native code for this Python."""
    return any((package / "native" / f"_cpu{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


def shadowing() -> str:
    """ "" unless this copy has no native extension and hides an installed one that has; then the remedy."""
    other = hidden_copy()
    if other is None or has_extension(PACKAGE) or not has_extension(other):
        return ""
    return (
        f"Python imported the checkout {PACKAGE}, which has no native extension, instead of the package installed in "
        f"{other}: start Python in another folder, or install the checkout itself (pip install --editable .)"
    )


def why_no_extension(error: ImportError) -> str:
    """Why importing the extension failed, and the remedy."""
    if reason := shadowing():
        return reason
    others = sorted(path.name for path in PACKAGE.glob("native/_cpu.*") if path.suffix in (".so", ".pyd"))
    if others and not has_extension(PACKAGE):
        return f"the native extension was built for another Python ({', '.join(others)}): reinstall with this one"
    return f"the native extension _cpu is missing ({error}); was there a C++ compiler during installation?"


@cache
def warn_of_shadowing() -> None:
    """Warn about `shadowing`, once per process."""
    if reason := shadowing():
        warnings.warn(reason, stacklevel=4)
