"""The exceptions that stepsave raises.

    StepsaveError
    ├── InvalidStateError       (TypeError)    a leaf or a name that cannot be saved
    ├── BackupDirectoryError    (OSError)      the directory cannot be used
    │   ├── DirectoryBusyError                 … because somebody else uses it
    │   └── BucketError                        … because a bucket refuses or does not answer
    ├── CorruptBackupError      (ValueError)   what is on disk does not prove itself
    │   └── FormatVersionError                 … because a newer stepsave wrote it
    ├── BackupMismatchError     (ValueError)   a valid backup, but of another model or state
    ├── SaveFailedError         (RuntimeError) a save failed in the background
    ├── PeerError               (RuntimeError) another process of the training does not answer
    ├── ArenaMemoryError        (MemoryError)  no room for the host copy of the state
    ├── CheckpointerClosedError (RuntimeError) used after `close()`
    └── NestedCallError         (RuntimeError) used by a signal handler within a `save`

    Preempted                   (SystemExit)   training was saved and ended on a signal
    UnreproducibleDataWarning   (UserWarning)  data that a resumed run may see otherwise
    ChangedTrainingWarning      (UserWarning)  a backup of another training than the present
    SaveFailedWarning           (UserWarning)  a save failed, and training goes on without it

Each is also the builtin in parentheses, so that code which already catches that keeps
working. Every message names the thing, what was expected, what was found and what to do.
"""

from __future__ import annotations

import os
import signal

__all__ = (
    "ArenaMemoryError",
    "BackupDirectoryError",
    "BackupMismatchError",
    "BucketError",
    "ChangedTrainingWarning",
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
    "StepsaveError",
    "UnreproducibleDataWarning",
)


class StepsaveError(Exception):
    """Base of every error that stepsave raises on purpose."""


class InvalidStateError(StepsaveError, TypeError):
    """Raised when a state, a leaf of it, or its metadata cannot be saved as it is."""


class BackupDirectoryError(StepsaveError, OSError):
    """Raised when a backup directory cannot be used as it is."""


class DirectoryBusyError(BackupDirectoryError):
    """Raised when another live process or checkpointer uses the directory."""


class BucketError(BackupDirectoryError):
    """Raised when a bucket refuses, or does not answer in time, whatever was tried."""


class CorruptBackupError(StepsaveError, ValueError):
    """Raised when bytes on disk do not match what the backup says of itself.

    Attributes:
        ADVICE: What to do, the same for whatever is damaged; each text ends with it.
    """

    ADVICE = (
        "Nothing was deleted. Restore it from a copy, or move it away to start afresh; "
        "`double_checkpoint=True` keeps a second backup for such a case."
    )

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.ADVICE in text else f"{text} {self.ADVICE}"


class FormatVersionError(CorruptBackupError):
    """Raised when a backup was written in a format newer than this stepsave knows."""

    ADVICE = ""


class BackupMismatchError(StepsaveError, ValueError):
    """Raised when a valid backup does not fit the model or the state that should receive it."""


class SaveFailedError(StepsaveError, RuntimeError):
    """Raised when a save could not be made durable; the older backup is still valid."""


class PeerError(StepsaveError, RuntimeError):
    """Raised when another process of the same training does not say what it was waited for."""


class ArenaMemoryError(StepsaveError, MemoryError):
    """Raised when not even one host copy of the state fits into memory."""


class CheckpointerClosedError(StepsaveError, RuntimeError):
    """Raised when a checkpointer is used after it was closed."""


class NestedCallError(StepsaveError, RuntimeError):
    """Raised when a signal handler uses a checkpointer in the midst of its own `save`."""


class Preempted(SystemExit):
    """Raised out of `fit` after a signal, when the training is saved and the save is durable.

    A `SystemExit`: a script that does not catch it ends without a traceback, with an exit
    code by which a wrapper knows that it is to start the same command again.

    Attributes:
        EXIT_CODE: 75, `EX_TEMPFAIL` of sysexits.h: "the user is invited to retry later".
        signum: Number of the signal.
        step: The step that is saved.
        waited_s: Seconds from the signal until the save was durable.
    """

    EXIT_CODE = os.EX_TEMPFAIL

    def __init__(self, signum: int, step: int, waited_s: float) -> None:
        super().__init__(self.EXIT_CODE)
        self.signum = signum
        self.step = step
        self.waited_s = waited_s

    def __reduce__(self) -> tuple[type[Preempted], tuple[int, int, float]]:
        return type(self), (self.signum, self.step, self.waited_s)

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        return (
            f"{name}: step {self.step} is saved, {self.waited_s:.1f} s after the signal. Run the "
            "same script again to go on."
        )


class UnreproducibleDataWarning(UserWarning):
    """Warns that data may come in another order, or otherwise, after an interruption."""


class ChangedTrainingWarning(UserWarning):
    """Warns that a backup is of another training, or that this one goes on changed."""


class SaveFailedWarning(UserWarning):
    """Warns that a save is lost: a bucket or another process did not answer. Training goes on."""
