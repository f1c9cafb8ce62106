"""Which backups stay, beside the newest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stepsave.format.records import BackupRecord

__all__ = ("Retention",)


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
    """Which backups stay when a newer one is committed.

    Attributes:
        recent: How many before the newest.
        every: Of those older than that, the first of each so many steps stays for good; None for
            none of them.
    """

    recent: int
    every: int | None = None

    @classmethod
    def of(cls, *, double_checkpoint: bool, keep: object, keep_every: object) -> Retention:
        """Returns what the arguments of a checkpointer stand for.

        Raises:
            ValueError: If one is invalid.
        """
        recent = _check_count("keep", keep, least=0)
        every = None if keep_every is None else _check_count("keep_every", keep_every, least=1)
        return cls(max(recent, int(double_checkpoint)), every)

    def choose(self, older: Sequence[BackupRecord]) -> tuple[BackupRecord, ...]:
        """Returns which of the backups before the newest stay, newest first as they are given."""
        chosen = set(older[: self.recent])
        if self.every is not None:
            last = 0  # the first steps are no place to go back to
            for record in reversed(older[self.recent :]):
                if record.step // self.every > last:
                    last = record.step // self.every
                    chosen.add(record)
        return tuple(record for record in older if record in chosen)


def _check_count(name: str, value: object, *, least: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    expected = "a number of backups, 0 or more" if least == 0 else "a positive number of steps"
    raise ValueError(
        f"Invalid value for argument `{name}`. Received: {name}={value!r}. Expected {expected}."
    )
