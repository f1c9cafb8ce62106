"""What every kind of training data can do: be read from its start."""

from __future__ import annotations

from typing import Any

import keras

from stepsave.fit import keras_data
from stepsave.fit.keras_data import EpochData

__all__ = ("Source", "backend")


class Source:
    """Data of which nothing is known but that it can be read from its start."""

    name = "data of an unknown kind"
    draws_first: frozenset[str] = frozenset()
    """The global random generators that are drawn from once, when a stream begins."""

    def __init__(self, data: EpochData) -> None:
        self.data = data
        self.adapter = data.adapter
        self.object = keras_data.source_of(data.adapter)

    def doubt(self) -> str | None:
        """Why a resumed run may see other data than the uninterrupted one; None if it does not."""
        return None

    def state(self) -> Any:
        """What the data holds that a stream starts from, beside the global generators."""
        return None

    def set_state(self, state: Any) -> None:
        """Puts back what `state` returned."""

    def compare(self, state: Any) -> None:
        """Compares the data with what `state` returned before the interruption."""

    def place(self, batches: int) -> Any:
        """Where the present stream is after so many batches, if the data can tell; or None."""
        del batches
        return None

    def repeat_streams(self, created: int, used: int) -> None:
        """Moves the data on by streams that were made before, and those that were read from."""

    def open_at(self, batches: int, place: Any) -> tuple[Any, int]:
        """Makes what the next stream is an iterator of.

        Args:
            batches: How many batches of it are to be passed over.
            place: What `place` returned after these.

        Returns:
            The iterable, and how many of its batches must still be read and passed over.
        """
        del place
        return self.data.get_iterator(), batches

    def open(self) -> Any:
        """Makes what the next stream is an iterator of."""
        return self.data.get_iterator()

    def prepare(self, batches: int) -> None:
        """Called before the epoch begins in which so many batches are passed over.

        Workers of the data may start to load before its stream is opened.
        """

    def close_epoch(self) -> None:
        """Called when that epoch has ended."""

    def count(self, batches: int) -> None:
        """Notes that a stream has ended after so many batches."""


def backend() -> str:
    """Name of Keras's backend."""
    return keras.backend.backend()
