"""A backup that is wanted once, without a checkpointer."""

from __future__ import annotations

from typing import Any

from stepsave.engine.checkpointer import Checkpointer
from stepsave.engine.likeness import ArrayKind
from stepsave.format.records import Backup
from stepsave.store.places import Target

__all__ = ("restore",)


def restore(
    directory: Target,
    *,
    like: Any = None,
    step: int | None = None,
    arrays: ArrayKind = "numpy",
) -> Backup | None:
    """Reads the newest valid backup in a directory, which may be in use, and changes nothing.

    Args:
        directory: Where it is, or in which bucket, as in `Checkpointer`. No permission to write
            there is needed.
        like: As in `Checkpointer.restore`.
        step: That of a kept backup, if not the newest is wanted.
        arrays: As there.

    Returns:
        The backup, or None if there is none in the directory.

    Raises:
        BackupDirectoryError: If there is no such directory, or the backup was replaced again and
            again while it was being read.
        ValueError, CorruptBackupError, BackupMismatchError, InvalidStateError: As there.
    """
    with Checkpointer(directory, read_only=True) as reader:
        return reader.restore(like=like, step=step, arrays=arrays)
