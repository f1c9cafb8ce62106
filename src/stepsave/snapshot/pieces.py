"""Where the bytes of leaves that are staged go in an arena."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = ("Piece", "Pieces")


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes of a leaf, and where it goes.

    Attributes:
        number: Its place among all pieces of the state, in the order of the arena.
        leaf: The leaf, counted among those that are given with the pieces.
        source_bytes: Where it begins in the leaf.
        offset_bytes: Where it begins in the arena.
        size_bytes: How long it is.
    """

    number: int
    leaf: int
    source_bytes: int
    offset_bytes: int
    size_bytes: int

    @property
    def end_bytes(self) -> int:
        """Where it ends in the arena."""
        return self.offset_bytes + self.size_bytes


Pieces = Sequence[Piece]
"""In the order of the arena."""
