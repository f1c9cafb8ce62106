"""The exceptions that stepsave raises.

    StepsaveError
    ├── InvalidStateError       (TypeError)    a leaf or a name that cannot be saved
    ├── BackupDirectoryError    (OSError)      the directory cannot be used
    │   └── DirectoryBusyError                 … because somebody else uses it
    ├── CorruptBackupError      (ValueError)   what is on disk does not prove itself
    │   └── FormatVersionError                 … because a newer stepsave wrote it
    ├── BackupMismatchError     (ValueError)   a valid backup, but of another model
    ├── SaveFailedError         (RuntimeError) a save failed in the background
    ├── ArenaMemoryError        (MemoryError)  no room for the host copy of the state
    └── CheckpointerClosedError (RuntimeError) used after `close()`

Each is also the builtin in parentheses, so that code which already catches that keeps
working. Every message names the thing, what was expected, what was found and what to do.
"""

from __future__ import annotations

__all__ = (
    "ArenaMemoryError",
    "BackupDirectoryError",
    "BackupMismatchError",
    "CheckpointerClosedError",
    "CorruptBackupError",
    "DirectoryBusyError",
    "FormatVersionError",
    "InvalidStateError",
    "SaveFailedError",
    "StepsaveError",
)


class StepsaveError(Exception):
    """Base of every error that stepsave raises on purpose."""


class InvalidStateError(StepsaveError, TypeError):
    """Raised when a state, a leaf of it, or its metadata cannot be saved as it is."""


class BackupDirectoryError(StepsaveError, OSError):
    """Raised when a backup directory cannot be used as it is."""


class DirectoryBusyError(BackupDirectoryError):
    """Raised when another live process or checkpointer uses the directory."""


class CorruptBackupError(StepsaveError, ValueError):
    """Raised when bytes on disk do not match what the backup says of itself."""


class FormatVersionError(CorruptBackupError):
    """Raised when a backup was written in a format newer than this stepsave knows."""


class BackupMismatchError(StepsaveError, ValueError):
    """Raised when a valid backup does not fit the model that should receive it."""


class SaveFailedError(StepsaveError, RuntimeError):
    """Raised when a save could not be made durable; the older backup is still valid."""


class ArenaMemoryError(StepsaveError, MemoryError):
    """Raised when not even one host copy of the state fits into memory."""


class CheckpointerClosedError(StepsaveError, RuntimeError):
    """Raised when a checkpointer is used after it was closed."""
