"""One of the backups at a place, whoever writes there meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from stepsave.engine.known_files import COMMIT, PREVIOUS
from stepsave.engine.markers import Markers
from stepsave.errors import BackupDirectoryError
from stepsave.format.records import BackupRecord
from stepsave.store.places import Store

__all__ = ("Choice", "read_chosen")

T = TypeVar("T")

ATTEMPTS = 10
"""How often a backup may be replaced while it is being read, until the reader gives up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """Which backup is meant: the newest, unless something else is said.

    Attributes:
        step: That of this step.
        previous: The one before the newest.
    """

    step: int | None = None
    previous: bool = False

    def find(self, store: Store) -> BackupRecord:
        """Looks for it, as the markers are now.

        Raises:
            BackupDirectoryError: If there is no such backup.
            CorruptBackupError, OSError: If its marker cannot be read.
        """
        markers = Markers(store)
        markers.read_markers()
        there = [record for record in (markers.committed, markers.previous) if record is not None]
        for record in there:
            is_meant = record is (markers.previous if self.previous else markers.committed)
            if is_meant if self.step is None else record.step == self.step:
                return record
        name = PREVIOUS if self.previous else COMMIT
        for problem in (markers.problems.get(name), *markers.problems.values()):
            if problem is not None:
                raise problem
        meant = "a backup" if self.step is None else f"a backup of step {self.step}"
        meant = "a backup before the newest" if self.previous else meant
        steps = " and ".join(f"step {record.step}" for record in there)
        raise BackupDirectoryError(f"{store.root}: expected {meant}, found {steps or 'none'}.")


def read_chosen(store: Store, choice: Choice, read: Callable[[BackupRecord, int], T]) -> T:
    """Calls `read` with the backup that is meant; again, if it was replaced meanwhile.

    It proves itself, so what was read of two is refused; then the markers tell whether that is why.

    Args:
        store: Where it is.
        choice: Which one.
        read: Called with its record, and how many were tried before.

    Raises:
        BackupDirectoryError: If there is none; or it was replaced each time.
        Exception: What `read` raised for a backup that is still there.
    """
    store.check_directory()
    cause: Exception | None = None
    for attempt in range(ATTEMPTS):
        record = choice.find(store)
        try:
            return read(record, attempt)
        except Exception as e:
            if choice.find(store) == record:
                raise
            cause = e
    raise BackupDirectoryError(
        f"{store.root}: the backup was replaced {ATTEMPTS} times while it was being read; the last "
        f"time that showed as: {cause} Try again when saves are made less often."
    ) from cause
