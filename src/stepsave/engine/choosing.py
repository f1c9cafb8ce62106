"""One of the backups at a place, whoever writes there meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stepsave.engine.attempts import ATTEMPTS, ReplacedError, read_lasting
from stepsave.engine.known_files import COMMIT
from stepsave.engine.markers import Markers
from stepsave.errors import BackupDirectoryError
from stepsave.format.records import BackupRecord
from stepsave.store.places import Store

__all__ = ("choose_backup", "find_backup", "read_chosen")

T = TypeVar("T")


def find_backup(store: Store, step: int | None = None) -> BackupRecord:
    """Looks for the newest backup, or for that of a step, as the markers are now.

    Raises:
        BackupDirectoryError: If there is no such backup.
        CorruptBackupError, OSError: If its marker cannot be read.
    """
    markers = Markers(store)
    markers.read_markers()
    return choose_backup(store, markers, step)


def choose_backup(store: Store, markers: Markers, step: int | None = None) -> BackupRecord:
    """Returns the newest backup, or that of a step, as markers say that were read before.

    Raises:
        BackupDirectoryError: If there is no such backup.
        CorruptBackupError, OSError: If its marker could not be read.
    """
    meant = (markers.committed,) if step is None else markers.records
    for record in meant:
        if record is not None and step in (None, record.step):
            return record
    for name in (COMMIT, *markers.problems):
        if name in markers.problems:
            raise markers.problems[name]
    wanted = "a backup" if step is None else f"a backup of step {step}"
    if step is None and markers.kept:
        wanted = "the newest backup, whose marker COMMIT is missing"
    steps = ", ".join(f"step {record.step}" for record in markers.records) or "none"
    raise BackupDirectoryError(
        f"{store.root}: expected {wanted}, found {steps}. `stepsave inspect` says what lies there."
    )


def read_chosen(store: Store, step: int | None, read: Callable[[BackupRecord, int], T]) -> T:
    """Calls `read` with the newest backup, or that of a step; again, if it was replaced meanwhile.

    Args:
        store: Where it is.
        step: Of the one that is meant; None for the newest.
        read: Called with its record, and how many were tried before.

    Raises:
        BackupDirectoryError: If there is none; or it was replaced each time.
        Exception: What `read` raised for a backup that is still there.
    """
    store.check_directory()
    try:
        return read_lasting(
            lambda: find_backup(store, step), lambda record, attempt: (read(record, attempt), None)
        )
    except ReplacedError as e:
        raise BackupDirectoryError(
            f"{store.root}: the backup was replaced {ATTEMPTS} times while it was being read; the "
            f"last time that showed as: {e} Try again when saves are made less often."
        ) from e.__cause__
