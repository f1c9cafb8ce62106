"""What the demo's processes tell each other, one line of JSON per fact."""

from __future__ import annotations

import dataclasses
import json
from typing import Self

__all__ = ("EPOCHS", "SAVE_FREQ", "Comparison", "InFlight", "Outcome")

SAVE_FREQ = 5
"""Batches from one save to the next."""

EPOCHS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class _Fact:
    def to_line(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Raises `ValueError` or `TypeError` if the line is not what `to_line` returns."""
        return cls(**json.loads(line))


@dataclasses.dataclass(frozen=True, slots=True)
class InFlight(_Fact):
    """A save is being written at this moment.

    Attributes:
        epoch: Epoch in progress, from 0.
        batches: Batches done in it.
        steps_per_epoch: Batches in an epoch.
        step: Global step of the state that is being written.
    """

    epoch: int
    batches: int
    steps_per_epoch: int
    step: int


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome(_Fact):
    """A training has completed.

    Attributes:
        first_epoch: Epoch, from 0, of the first batch that this process trained.
        first_batch: That batch in the epoch, from 0.
        first_step: The optimizer's step counter before it.
        last_step: The same at the end.
        accuracy: Share of the test images that are classified correctly.
        digest: SHA-256 of every bit of the model and the optimizer at the end, in hexadecimal.
    """

    first_epoch: int
    first_batch: int
    first_step: int
    last_step: int
    accuracy: float
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison(_Fact):
    """What saving costs with both callbacks; medians, in seconds.

    Attributes:
        state_bytes: Size of what one save of stepsave holds.
        writer: How stepsave wrote, as in `SaveStats.writer`.
        saves: Saves that were measured with each callback.
        stall_s: Time for which a save of stepsave keeps training waiting.
        durable_s: Time until that save would survive a power cut; median of the medians of
            each training.
        keras_stall_s: As `stall_s`, with Keras's callback.
    """

    state_bytes: int
    writer: str
    saves: int
    stall_s: float
    durable_s: float
    keras_stall_s: float
