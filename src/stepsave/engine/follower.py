"""What a process has of a directory in which another process of the training saves."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from stepsave.engine.markers import Markers
from stepsave.engine.peers import Board
from stepsave.engine.read_only import ReadOnlyDirectory
from stepsave.engine.reader import Needs, StoredBackup, read_backup
from stepsave.engine.writer import SaveRequest, WriterKind
from stepsave.errors import BackupDirectoryError
from stepsave.format.records import BackupRecord
from stepsave.store.lock import LOCK_LIMIT_BYTES, LOCK_NAME
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = ("FollowerDirectory",)

_READ_S = 3600.0
"""How long process 0 may take to read a backup."""

_SIGHT_S = 30.0
"""How long what another machine has written may take to be seen: network file systems keep old
entries for a while."""


class FollowerDirectory(ReadOnlyDirectory):
    """Restores what process 0 restores, and leaves saving to it; else as `BackupDirectory`."""

    saves_here = False

    def __init__(self, store: Store, helpers: Crew, board: Board) -> None:
        """Touches nothing yet."""
        super().__init__(store, helpers)
        self._board = board
        self._restores = itertools.count()

    def open(self, writer: WriterKind, lanes: int, *, double_checkpoint: bool) -> int:
        """Waits until process 0 has opened the directory, and makes sure that it is the same.

        Raises:
            BackupDirectoryError: If process 0 could not open it, or it is another directory.
            PeerError: If process 0 says nothing.
        """
        del writer, lanes, double_checkpoint
        told = self._board.hear("open")
        if told["error"]:
            raise BackupDirectoryError(f"Process 0 could not open it: {told['error']}")
        if told["nonce"] and not _comes_true(lambda: self._sees(told["nonce"])):
            raise BackupDirectoryError(
                f"{self._store.root}: expected the directory that process 0 has opened, found "
                "another one under this name: it is not shared between the machines. Put it on a "
                "file system that all processes see, or into a bucket."
            )
        return int(told["step"])

    def _sees(self, nonce: str) -> bool:
        try:
            return nonce.encode() in self._store.read(LOCK_NAME, LOCK_LIMIT_BYTES)
        except FileNotFoundError:
            return False

    def check_writable(self) -> None:
        """Nothing to object: another process does it."""

    def write(self, request: SaveRequest) -> None:
        """Never called."""
        raise AssertionError(request)

    def restore(self, needs: Needs | None = None) -> tuple[StoredBackup | None, str]:
        """Reads the backup that process 0 restores, at the same time.

        Raises:
            BackupDirectoryError: If it could not, or that backup is not to be seen here.
            CorruptBackupError: If it cannot be read here.
            PeerError: If process 0 says nothing.
        """
        number = next(self._restores)
        first = self._board.hear(f"reads {number}")["nonce"]
        found, error = None, None
        if first:
            try:
                found = self._read(first, needs)
            except Exception as e:  # noqa: BLE001  raised below, if process 0 can read it
                error = e
        told = self._board.hear(f"restore {number}", _READ_S)
        if told["error"]:
            raise BackupDirectoryError(f"Process 0 could not restore: {told['error']}")
        if told["nonce"] != first:  # it has fallen back
            found = self._read(told["nonce"], needs)
        elif error is not None:
            raise error
        self._board.say(f"restored {number} {self._board.peers.rank}")
        return found, ""

    def _read(self, nonce: str, needs: Needs | None) -> StoredBackup:
        return read_backup(self._store, self._record(nonce), self._helpers, needs)

    def _record(self, nonce: str) -> BackupRecord:
        records: list[BackupRecord] = []

        def look() -> bool:
            markers = Markers(self._store)
            markers.read_markers()
            both = (markers.committed, markers.previous)
            records[:] = [record for record in both if record and record.nonce == nonce]
            return bool(records)

        if not _comes_true(look):
            raise BackupDirectoryError(
                f"{self._store.root}: process 0 has restored a backup that is not to be seen here. "
                "The file system shows the processes different things."
            )
        return records[0]

    def mark_ended(self) -> None:
        """Nothing to do: process 0 does it."""

    delete_backup = upload = mark_ended


def _comes_true(look: Callable[[], bool]) -> bool:
    """Whether something is seen, perhaps after a while."""
    end_s = time.monotonic() + _SIGHT_S
    while not look():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True
