"""Errors of more than one module."""

from __future__ import annotations

__all__ = ["CannotServe"]


class CannotServe(RuntimeError, ValueError):
    """A backend asked for by name cannot compute this call here: a fault of the choice, not of the program."""
