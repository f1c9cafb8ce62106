"""Reading what may be replaced meanwhile: no reader takes a lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ("ATTEMPTS", "ReplacedError", "read_lasting")

S = TypeVar("S")
T = TypeVar("T")

ATTEMPTS = 10
"""How often backups may be replaced while they are being read, until the reader gives up."""


class ReplacedError(Exception):
    """Of each attempt; says what the last one met. For callers, who know what they read."""


def read_lasting(look: Callable[[], S], read: Callable[[S, int], tuple[T, object]]) -> T:
    """Reads what is there; again, if that has met damage and something else is there by now.

    A training may replace backups at any instant. What is left of one, or was read of two, does
    not prove itself; so it shows as damage, and a second look tells whether that is why.

    Args:
        look: Returns what is there, to be compared.
        read: Called with that, and how often it was tried before. Returns what it has read, and
            what was damaged, if anything; or raises.

    Raises:
        ReplacedError: From what `read` raised last, if something else was there each time.
        Exception: What `read` raised for what is still there.
    """
    error: Exception | None = None
    damage: object = None
    for attempt in range(ATTEMPTS):
        there = look()
        found: list[T] = []
        try:
            one, damage = read(there, attempt)
            found, error = [one], None
        except Exception as e:  # noqa: BLE001  raised below, if nobody else is the cause
            error = damage = e
        if not damage or look() == there:
            if error is not None:
                raise error
            return found[0]
    raise ReplacedError(damage) from error
