"""The files of a backup under the names that they have in Keras's callback."""

from __future__ import annotations

import os

from stepsave.engine.checkpointer import Checkpointer
from stepsave.engine.known_files import COMMIT, PREVIOUS, TRAINING_PATH
from stepsave.format import orbax
from stepsave.format.records import BackupRecord

__all__ = ("KerasFiles",)


class KerasFiles:
    """Private attributes of `keras.callbacks.BackupAndRestore` that its tests read.

    They overwrite these files to see that the backup is then unreadable.
    """

    backup_dir: str
    _saver: Checkpointer | None
    _last_records: tuple[BackupRecord | None, BackupRecord | None]

    @property
    def _weights_path(self) -> str:
        return self._file_of(0, orbax.MANIFEST_PATH, COMMIT)

    @property
    def _training_metadata_path(self) -> str:
        return self._file_of(0, TRAINING_PATH, COMMIT)

    @property
    def _prev_weights_path(self) -> str:
        return self._file_of(1, orbax.MANIFEST_PATH, PREVIOUS)

    @property
    def _prev_training_metadata_path(self) -> str:
        return self._file_of(1, TRAINING_PATH, PREVIOUS)

    def _file_of(self, which: int, path: str, marker: str) -> str:
        if self._saver is not None and not self._saver.closed:
            self._last_records = (self._saver.committed, self._saver.previous)
        record = self._last_records[which]
        below = marker if record is None else os.path.join(record.directory, path)
        return os.path.join(self.backup_dir, below)
