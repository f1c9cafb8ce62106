"""Asynchronous, crash-safe backup of a training state, every few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepsave import rng
from stepsave.engine.checkpointer import Checkpointer
from stepsave.engine.restoring import restore
from stepsave.engine.saves import SaveHandle
from stepsave.errors import (
    ArenaMemoryError,
    BackupDirectoryError,
    BackupMismatchError,
    ChangedTrainingWarning,
    CheckpointerClosedError,
    CorruptBackupError,
    DirectoryBusyError,
    FormatVersionError,
    InvalidStateError,
    NestedCallError,
    Preempted,
    SaveFailedError,
    StepsaveError,
    UnreproducibleDataWarning,
)
from stepsave.format.records import Backup, SaveStats
from stepsave.position import TrainingPosition

if TYPE_CHECKING:
    from stepsave.fit.callback import BackupAndRestore

__all__ = (
    "ArenaMemoryError",
    "Backup",
    "BackupAndRestore",
    "BackupDirectoryError",
    "BackupMismatchError",
    "ChangedTrainingWarning",
    "Checkpointer",
    "CheckpointerClosedError",
    "CorruptBackupError",
    "DirectoryBusyError",
    "FormatVersionError",
    "InvalidStateError",
    "NestedCallError",
    "Preempted",
    "SaveFailedError",
    "SaveHandle",
    "SaveStats",
    "StepsaveError",
    "TrainingPosition",
    "UnreproducibleDataWarning",
    "restore",
    "rng",
)

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The callback needs Keras, which takes seconds to import and picks a backend; the
    # engine needs neither.
    if name == "BackupAndRestore":
        from stepsave.fit.callback import BackupAndRestore

        return BackupAndRestore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
