"""A backup directory that is only read, whoever writes in it meanwhile."""

from __future__ import annotations

import os

from stepsave.engine.attempts import ATTEMPTS, ReplacedError, read_lasting
from stepsave.engine.extents import Needs
from stepsave.engine.markers import Markers
from stepsave.engine.newest import restore_newest
from stepsave.engine.reader import StoredBackup, read_backup
from stepsave.engine.retention import Retention
from stepsave.engine.writer import SaveRequest, WriterKind
from stepsave.errors import BackupDirectoryError, CheckpointerClosedError
from stepsave.format.records import BackupRecord
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = ("ReadOnlyDirectory",)


class ReadOnlyDirectory:
    """What a checkpointer has of a directory that it only reads; else as `BackupDirectory`.

    No lock is taken, so a backup may be replaced at any instant; then the newer one is read.
    """

    writer_name = ""
    saves_here = True  # and refuses it

    def __init__(self, store: Store, helpers: Crew) -> None:
        """Touches nothing yet."""
        self._store = store
        self._helpers = helpers
        self._pid = os.getpid()
        self.is_released = False

    def open(self, writer: WriterKind, lanes: int, retention: Retention) -> int:
        """Looks whether there is such a directory; the arguments are for those who write.

        Raises:
            BackupDirectoryError: If there is none.
        """
        del writer, lanes, retention
        self._store.check_directory()
        return -1  # nothing is saved here

    @property
    def committed(self) -> BackupRecord | None:
        """The newest valid backup now."""
        return self._read_markers().committed

    @property
    def kept(self) -> tuple[BackupRecord, ...]:
        """The backups before it that are kept, newest first."""
        return self._read_markers().kept

    @property
    def is_held(self) -> bool:
        return not self.is_released and os.getpid() == self._pid

    def check_held(self) -> None:
        """Raises unless it is open."""
        if not self.is_held:
            raise CheckpointerClosedError(
                f"The checkpointer of {self._store.root} is closed, or belongs to the parent of "
                "this forked process. Make a new one."
            )

    def check_writable(self) -> None:
        """Raises."""
        raise BackupDirectoryError(
            f"{self._store.root}: was opened with `read_only=True`, so nothing can be saved or "
            "removed there. Open it without, or another directory."
        )

    def write(self, request: SaveRequest) -> None:
        """Never called."""
        raise AssertionError(request)

    def pass_over(self, step: int) -> None:
        """Never called."""
        raise AssertionError(step)

    def restore(
        self, needs: Needs | None = None, step: int | None = None
    ) -> tuple[StoredBackup | None, str]:
        """Reads the newest backup; again, if it was replaced meanwhile.

        Raises:
            CorruptBackupError: If there is one, but it cannot be read.
            BackupDirectoryError: If it was replaced each time.
        """

        def read(_: object, __: int) -> tuple[tuple[StoredBackup | None, str], str]:
            found, lost = restore_newest(
                str(self._store.root),
                Markers(self._store),
                lambda record: read_backup(self._store, record, self._helpers, needs),
                step,
            )
            return (found, lost), lost

        try:
            return read_lasting(lambda: self._read_markers().records, read)
        except ReplacedError as e:
            raise BackupDirectoryError(
                f"{self._store.root}: the backup was replaced {ATTEMPTS} times while it was being "
                f"read; the last time that showed as: {e} Read it again when saves are made less "
                "often, or read a copy of the directory."
            ) from e.__cause__

    def _read_markers(self) -> Markers:
        markers = Markers(self._store)
        markers.read_markers()
        return markers

    def delete_backup(self) -> None:
        """Raises."""
        self.check_writable()

    mark_ended = upload = delete_backup

    def release(self, *, remove: bool = False) -> None:
        """Lets go of it; nothing is there to be removed."""
        del remove
        self.is_released = True
