"""What the exit status of a command says."""

from __future__ import annotations

__all__ = ("FOUND", "UNASKED")

FOUND = 1
"""Damage or a difference was found."""

UNASKED = 2
"""The question could not be asked: wrong arguments, no such place, no answer."""
