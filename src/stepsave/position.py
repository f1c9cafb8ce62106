"""Where in a training a backup was taken, and where training goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

from stepsave.errors import CorruptBackupError

__all__ = ("TrainingPosition",)


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingPosition:
    """A point between two batches, for the metadata of a backup.

    Attributes:
        global_step: Batches trained since the beginning, repeated ones included.
        epoch: Epoch in progress, from 0.
        batch: Batches done in that epoch.
        steps_per_epoch: Batches in an epoch, if known.
    """

    global_step: int
    epoch: int
    batch: int
    steps_per_epoch: int | None = None

    @property
    def resume_epoch(self) -> int:
        """The epoch at which a training goes on that can only begin at the head of one.

        That is the epoch in progress, which Keras's own callback repeats too; but if all
        its batches were done, repeating it would train each of them twice.
        """
        done = self.steps_per_epoch is not None and self.batch >= self.steps_per_epoch > 0
        return self.epoch + 1 if done else self.epoch

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> TrainingPosition:
        """Raises `CorruptBackupError` if the document is not what `to_json` returns."""
        try:
            position = cls(**document)
        except TypeError as e:
            raise CorruptBackupError(
                f"Expected a training position in the backup's metadata, found {document!r}. "
                "It was not written by `stepsave.BackupAndRestore`; use another directory."
            ) from e
        numbers = (position.global_step, position.epoch, position.batch)
        steps = position.steps_per_epoch
        if not all(type(n) is int and n >= 0 for n in numbers) or type(steps) not in (
            int,
            type(None),
        ):
            raise CorruptBackupError(f"Impossible training position in the backup: {document!r}.")
        return position
