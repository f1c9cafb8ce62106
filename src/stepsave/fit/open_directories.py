"""Which callback of this process has which backup directory."""

from __future__ import annotations

import os
import weakref
from typing import Any

from stepsave.engine.checkpointer import Checkpointer

__all__ = ("take_directory",)

# What callbacks have open, by directory. A notebook that was interrupted and makes a new
# callback for the same directory must not be refused because of the old one.
_savers: weakref.WeakValueDictionary[str, Checkpointer] = weakref.WeakValueDictionary()


def take_directory(
    callback: Any, directory: str, **options: Any
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
    key = os.path.realpath(directory)
    other = _savers.get(key)
    if other is not None:
        other.close()  # of a fit that was interrupted, or it would have closed it itself
    saver = _savers[key] = Checkpointer(directory, **options)
    return saver, weakref.finalize(callback, saver.close)
