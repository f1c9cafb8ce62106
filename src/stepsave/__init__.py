"""Asynchronous, crash-safe backup of a training state, every few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepsave import rng
from stepsave.checkpointer import Checkpointer
from stepsave.errors import (
    ArenaMemoryError,
    BackupDirectoryError,
    BackupMismatchError,
    CheckpointerClosedError,
    CorruptBackupError,
    DirectoryBusyError,
    FormatVersionError,
    InvalidStateError,
    Preempted,
    SaveFailedError,
    StepsaveError,
    UnreproducibleDataWarning,
)
from stepsave.handle import SaveHandle
from stepsave.resume import TrainingPosition
from stepsave.spec import Backup, SaveStats

if TYPE_CHECKING:
    from stepsave.callback import BackupAndRestore

__all__ = (
    "ArenaMemoryError",
    "Backup",
    "BackupAndRestore",
    "BackupDirectoryError",
    "BackupMismatchError",
    "Checkpointer",
    "CheckpointerClosedError",
    "CorruptBackupError",
    "DirectoryBusyError",
    "FormatVersionError",
    "InvalidStateError",
    "Preempted",
    "SaveFailedError",
    "SaveHandle",
    "SaveStats",
    "StepsaveError",
    "TrainingPosition",
    "UnreproducibleDataWarning",
    "rng",
)

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The callback needs Keras, which takes seconds to import and picks a backend; the
    # engine needs neither.
    if name == "BackupAndRestore":
        from stepsave.callback import BackupAndRestore

        return BackupAndRestore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
