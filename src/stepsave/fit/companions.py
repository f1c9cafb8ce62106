"""Several of stepsave's callbacks in one `fit`, each with a backup directory of its own.

Such as a fast disk that is saved to often, and a shared one once per epoch. All of them go on
from the newest of their backups.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Protocol

from stepsave.fit.keras_internals import RunningFit, is_in_fit
from stepsave.fit.preemption import PreemptionSignals

__all__ = ("Companions", "Start")


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """Where a `fit` begins, by a backup.

    Attributes:
        global_step: Batches trained before.
        epoch: The epoch that goes on; None for where the caller of `fit` says.
        batch: Batches of it that were trained before.
        keeps_backup: Whether the backup is to be kept if this `fit` saves nothing, as it is
            another's.
    """

    global_step: int
    epoch: int | None
    batch: int
    keeps_backup: bool

    def __str__(self) -> str:
        at = "its first epoch" if self.epoch is None else f"epoch {self.epoch + 1}"
        return at + (f", batch {self.batch + 1}" if self.batch else "")


class Member(Protocol):
    """One of the callbacks."""

    def begin_at(self, start: Start) -> None:
        """Counts from there: the state was restored, by another one or this."""

    def forget_restored(self) -> None:
        """Puts nothing back any more: another one has a newer backup."""


class Companions:
    """The callbacks of one `fit`."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[Member]] = []
        self.start: Start | None = None
        self._signals: PreemptionSignals | None = None

    @classmethod
    def of(cls, fit: RunningFit | None, member: Member) -> Companions:
        """Joins those of a `fit`; if that is not known, a callback is alone."""
        companions = cls() if fit is None else fit.shared(cls, cls)
        companions._members.append(weakref.ref(member))  # noqa: SLF001  of this class
        return companions

    def begin_at(self, start: Start) -> None:
        """Has all begin there, whatever was restored before."""
        self.start = start
        for reference in self._members:
            member = reference()
            if member is not None:
                member.forget_restored()
                member.begin_at(start)

    def signals(self, fit: RunningFit, model: Any) -> PreemptionSignals:
        """The handlers of signals that they share, not installed yet."""
        if self._signals is None:
            self._signals = PreemptionSignals(is_in_fit(fit, model))
        return self._signals
