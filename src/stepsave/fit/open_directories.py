"""Which callback of this process has which backup directory."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from stepsave.engine.checkpointer import Checkpointer
from stepsave.engine.retention import Retention
from stepsave.errors import BucketError, DirectoryBusyError, SaveFailedError, SaveFailedWarning
from stepsave.store.places import Target, open_store

__all__ = ("check_kept", "check_retention", "close_directory", "take_directory")

# What callbacks have open, by directory. A notebook that was interrupted and makes a new
# callback for the same directory must not be refused because of the old one.
_savers: weakref.WeakValueDictionary[str, Checkpointer] = weakref.WeakValueDictionary()


def take_directory(
    callback: Any, directory: Target, **options: Any
) -> tuple[Checkpointer, weakref.finalize[Any, Any]]:
    """Opens a directory for a callback, and closes what another callback has open there.

    Args:
        callback: The callback. It is told nothing when `fit` raises; its saves are finished
            when it is collected or the interpreter exits, and a failure is printed then.
        directory: The backup directory.
        options: Of the `Checkpointer`.

    Returns:
        The checkpointer, and what closes it then.

    Raises:
        BackupDirectoryError: If it cannot be used, or another process uses it.
    """
    key = str(open_store(directory).root)
    other = _savers.get(key)
    if other is not None:
        other.close()  # of a fit that was interrupted, or it would have closed it itself
    saver = _savers[key] = Checkpointer(directory, **options)
    return saver, weakref.finalize(callback, saver.close)


def check_kept(saver: Checkpointer | None, directory: str) -> Checkpointer:
    """Returns what a callback has open, unless it has lost it to another one.

    Raises:
        DirectoryBusyError: If it has.
    """
    if saver is None or saver.closed:
        raise DirectoryBusyError(
            f"{directory}: another callback of this process has taken this backup directory over. "
            "Give each its own directory."
        )
    return saver


def check_retention(keep: object, keep_every: object, *, deletes: bool) -> None:
    """Checks which backups are to be kept.

    Raises:
        ValueError: If that is invalid; or if what is to stay for good would be removed.
    """
    Retention.of(double_checkpoint=False, keep=keep, keep_every=keep_every)
    if keep_every is not None and deletes:
        raise ValueError(
            f"Invalid value for argument `keep_every`. Received: keep_every={keep_every!r} with "
            "delete_checkpoint=True, which removes all backups when `fit` has completed. Pass "
            "`delete_checkpoint=False` to keep them."
        )


def close_directory(
    saver: Checkpointer, at_exit: weakref.finalize[Any, Any] | None, *, deletes: bool, keeps: bool
) -> None:
    """Lets go of a directory at the end of a `fit`.

    Args:
        saver: What `take_directory` returned.
        at_exit: What closes it otherwise.
        deletes: Whether to remove the backup.
        keeps: Whether there is more to train by it: it is kept all the same, and not said to be the
            last of its training.

    Raises:
        SaveFailedError: If a save failed; the backup is then kept. If a bucket was out of reach it
            is a warning.
    """
    try:
        saver.close(delete_backup=deletes and not keeps, ended=not keeps)
    except (SaveFailedError, BucketError) as e:
        if not isinstance(e, BucketError) and not isinstance(e.__cause__, BucketError):
            raise
        warnings.warn(
            "stepsave: the training has ended, but the bucket was out of reach. What is in it "
            f"stays there: a run of the same script may go on from it. {e}",
            SaveFailedWarning,
            stacklevel=4,
        )
    finally:
        if saver.closed and at_exit is not None:
            at_exit.detach()
