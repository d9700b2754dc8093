"""Errors raised by more than one module."""

from __future__ import annotations

__all__ = ["CannotServe"]


class CannotServe(RuntimeError, ValueError):
    """A backend requested by name does not support this call: a user error, not a bug."""
