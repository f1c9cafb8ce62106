"""Asynchronous, crash-safe backup of a training state, every few steps."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepsave import rng
    from stepsave.engine.checkpointer import Checkpointer
    from stepsave.engine.frequency import SaveFrequency
    from stepsave.engine.report import SaveReport
    from stepsave.engine.restoring import restore
    from stepsave.engine.saves import SaveHandle
    from stepsave.errors import (
        ArenaMemoryError,
        BackupDirectoryError,
        BackupMismatchError,
        BucketError,
        ChangedTrainingWarning,
        CheckpointerClosedError,
        CorruptBackupError,
        DirectoryBusyError,
        FormatVersionError,
        InvalidStateError,
        NestedCallError,
        PeerError,
        Preempted,
        SaveFailedError,
        SaveFailedWarning,
        StepsaveError,
        UnreproducibleDataWarning,
    )
    from stepsave.fit.callback import BackupAndRestore
    from stepsave.format.records import Backup, SaveStats
    from stepsave.position import TrainingPosition

__all__ = (
    "ArenaMemoryError",
    "Backup",
    "BackupAndRestore",
    "BackupDirectoryError",
    "BackupMismatchError",
    "BucketError",
    "ChangedTrainingWarning",
    "Checkpointer",
    "CheckpointerClosedError",
    "CorruptBackupError",
    "DirectoryBusyError",
    "FormatVersionError",
    "InvalidStateError",
    "NestedCallError",
    "PeerError",
    "Preempted",
    "SaveFailedError",
    "SaveFailedWarning",
    "SaveFrequency",
    "SaveHandle",
    "SaveReport",
    "SaveStats",
    "StepsaveError",
    "TrainingPosition",
    "UnreproducibleDataWarning",
    "restore",
    "rng",
)

__version__ = "0.1.0"

_HOMES = {
    "Backup": "stepsave.format.records",
    "BackupAndRestore": "stepsave.fit.callback",
    "Checkpointer": "stepsave.engine.checkpointer",
    "SaveFrequency": "stepsave.engine.frequency",
    "SaveHandle": "stepsave.engine.saves",
    "SaveReport": "stepsave.engine.report",
    "SaveStats": "stepsave.format.records",
    "TrainingPosition": "stepsave.position",
    "restore": "stepsave.engine.restoring",
}


def __getattr__(name: str) -> Any:
    # All is imported when it is used: the callback needs Keras, which takes seconds and picks a
    # backend; the engine needs what checksums and reads and writes files.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "rng":
        return importlib.import_module("stepsave.rng")
    home = importlib.import_module(_HOMES.get(name, "stepsave.errors"))
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
