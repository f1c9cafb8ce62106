"""What an arena holds, piece by piece, so that what has not changed is neither copied nor written.

A piece is known by a hash of 128 bits, which a state that trains for years does not make collide by
chance; 32 bits of a checksum are too few for a promise. Equal hashes of a piece in the state and in
an arena save the copy and the checksum; in an arena and in the retired backup, the write.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import cast

import xxhash

from stepsave.snapshot.pages import Bytes

__all__ = ("Attention", "Contents", "Held", "Piece", "digest")

Piece = tuple[bytes, int]
"""A hash of the bytes of a piece, and their CRC-32C."""

Contents = list[list["Piece | None"]]
"""By run, its pieces; None for one of which nobody has asked."""

digest = cast("Callable[[Bytes], bytes]", xxhash.xxh3_128_digest)
"""XXH3 of 128 bits. Releases the interpreter's lock for large pieces."""

_TRIES = 2
"""How many saves in a row it takes to see whether something changes from one to the next."""

_PAUSE = 4
_LONGEST_PAUSE = 64
"""For how many saves nobody asks about what has always changed; doubled each time."""


class _Habit:
    """Of one run."""

    __slots__ = ("latest", "pause", "rest", "tries")

    def __init__(self) -> None:
        self.rest = 1  # saves until it is asked: not in the first, there is nothing to compare with
        self.pause = _PAUSE
        self.tries = 0
        self.latest: Sequence[Piece | None] = ()


class Attention:
    """Which runs to ask about. A training that changes everything must not pay for the question.

    Of each run one thread at a time asks and notes.
    """

    def __init__(self) -> None:
        self._habits: dict[int, _Habit] = collections.defaultdict(_Habit)

    def asks(self, run: int) -> bool:
        """Whether to ask about a run in this save; once per save."""
        habit = self._habits[run]
        if habit.rest:
            habit.rest -= 1
            return False
        return True

    def note(self, run: int, pieces: Sequence[Piece | None]) -> None:
        """Takes note of what was found in a save in which it was asked."""
        habit = self._habits[run]
        latest, habit.latest = habit.latest, tuple(pieces)
        if any(
            one is not None and one == other for one, other in zip(pieces, latest, strict=False)
        ):
            habit.tries, habit.pause = 0, _PAUSE
            return
        habit.tries += 1
        if habit.tries >= _TRIES:
            habit.tries, habit.rest = 0, habit.pause
            habit.pause = min(2 * habit.pause, _LONGEST_PAUSE)


class Held:
    """What an arena holds of the state that is being copied in, and what it held before.

    Attributes:
        now: As far as it is known by now; not changed any more when the state is in the arena.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], before: Contents, *, stays: bool) -> None:
        """Takes note of a state that begins to be copied.

        Args:
            sizes: Of the pieces, in bytes, by run.
            before: What is known of the state that was there before; empty if nothing is.
            stays: Whether it is there until it is overwritten, piece by piece.
        """
        self._sizes = sizes
        self._before = before
        self.now: Contents = (
            [list(pieces) for pieces in before]
            if stays and before
            else [[None] * len(run_sizes) for run_sizes in sizes]
        )

    def changed_bytes(self) -> int:
        """How much of the state is not known to be what was there before."""
        if not self._before:
            return sum(map(sum, self._sizes))
        return sum(
            size
            for sizes, before, now in zip(self._sizes, self._before, self.now, strict=True)
            for size, old, new in zip(sizes, before, now, strict=True)
            if new is None or new != old
        )
