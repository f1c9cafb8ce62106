"""What a process has of a directory that another process of the training has opened."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from stepsave.engine.agreed_reading import FollowedReading
from stepsave.engine.agreement import Following, Order, Report, SkippedError
from stepsave.engine.commit import Written
from stepsave.engine.extents import Needs
from stepsave.engine.known_files import training_path
from stepsave.engine.markers import Markers
from stepsave.engine.peers import Board
from stepsave.engine.read_only import ReadOnlyDirectory
from stepsave.engine.reader import StoredBackup, read_backup
from stepsave.engine.retention import Retention
from stepsave.engine.saves import SaveLog
from stepsave.engine.shard_writing import Shards
from stepsave.engine.writer import SaveRequest, WriterKind, carry_out
from stepsave.errors import BackupDirectoryError, PeerError
from stepsave.format.checksum import crc32c
from stepsave.format.orbax import ARENA_PATH
from stepsave.format.records import BackupRecord, FileRecord
from stepsave.store.bucket import BucketStore
from stepsave.store.lock import LOCK_LIMIT_BYTES, LOCK_NAME
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = ("FollowerDirectory",)

_SIGHT_S = 30.0
"""How long what another machine has written may take to be seen: network file systems keep old
entries for a while."""

_SHOWS_OTHER_THINGS = (
    "The file system shows the processes different things. Use one that shows all the same, or a "
    "bucket."
)

_REMEMBERED = 3  # saves whose shards may be written over: two are valid at most, one is retired


class FollowerDirectory(ReadOnlyDirectory):
    """Restores what process 0 restores, and writes its part of each save; else as
    `BackupDirectory`.

    Where all processes have everything (PyTorch, TensorFlow) it writes nothing.
    """

    def __init__(self, store: Store, log: SaveLog, helpers: Crew, board: Board) -> None:
        """Touches nothing yet."""
        super().__init__(store, helpers)
        self.saves_here = board.peers.share_saves
        self._log = log
        self._board = board
        self._following = Following(board)
        self._reading = FollowedReading(board)
        self._written: dict[str, Written] = {}  # by the nonce of the backup

    def open(self, writer: WriterKind, lanes: int, retention: Retention) -> int:
        """Waits until process 0 has opened the directory, and makes sure that it is the same.

        Raises:
            BackupDirectoryError: If process 0 could not open it, or it is another directory.
            PeerError: If process 0 says nothing.
        """
        del writer, retention  # as process 0 says
        told = self._board.hear("open")
        if told["error"]:
            raise BackupDirectoryError(f"Process 0 could not open it: {told['error']}")
        if told["nonce"] and not _comes_true(lambda: self._sees(told["nonce"])):
            raise BackupDirectoryError(
                f"{self._store.root}: expected the directory that process 0 has opened, found "
                "another one under this name: it is not shared between the machines. Put it on a "
                "file system that all processes see, or into a bucket."
            )
        self.writer_name = told["writer"]
        direct = self.writer_name == "direct"
        self._shards = Shards(self._store, self._helpers, direct=direct, lanes=lanes)
        return int(told["step"])

    def _sees(self, nonce: str) -> bool:
        try:
            return nonce.encode() in self._store.read(LOCK_NAME, LOCK_LIMIT_BYTES)
        except FileNotFoundError:
            return False

    def check_writable(self) -> None:
        """Nothing to object: process 0 has looked."""

    def write(self, request: SaveRequest) -> None:
        """Writes this process's part of a save; returns when all of it is durable, or given up."""
        carry_out(request, self._log, self._save, self.pass_over)

    def _save(self, request: SaveRequest) -> None:
        handle, size_bytes = request.handle, request.handle.bytes
        snapshot = request.snapshot
        try:
            order = self._following.hear_order(handle.step, size_bytes)
            try:
                report = self._write(request, order)
            except BaseException as e:
                try:
                    self._following.check_wanted()  # else that may well be the reason
                finally:
                    self._following.report(error=f"{type(e).__name__}: {e}")
                raise
        finally:
            snapshot.filling.wait_left()
            handle.claim.release()  # its bytes are on disk, or given up
        contents = snapshot.filling.held.now
        self._following.report(report)
        nonce = self._following.hear_end(size_bytes)
        self._written[nonce] = Written(snapshot.blueprint.plan, contents, nonce)
        while len(self._written) > _REMEMBERED:
            del self._written[next(iter(self._written))]

    def _write(self, request: SaveRequest, order: Order) -> Report:
        snapshot, handle = request.snapshot, request.handle
        self._await_directory(order.directory)
        written = self._written.pop(order.held, None)
        is_known = written is not None and written.plan is snapshot.blueprint.plan
        known = written.contents if written is not None and is_known else None
        with handle.course.writing():
            digests, written_bytes = self._shards.write(order.directory, snapshot, known)
        handle.changed_bytes = snapshot.filling.held.changed_bytes()
        handle.written_bytes = written_bytes
        files: list[FileRecord] = []
        if crc32c(request.training) != order.training:
            path = training_path(self._board.peers.rank)
            self._store.write_all({f"{order.directory}/{path}": request.training})
            files.append(FileRecord.of(path, request.training))
        return Report(snapshot.blueprint.layout_crc32c, digests, tuple(files))

    def _await_directory(self, directory: str) -> None:
        store = self._store
        if isinstance(store, BucketStore):
            return  # objects need none

        def look() -> bool:
            if store.exists(f"{directory}/{ARENA_PATH}/c"):
                return True
            self._following.check_wanted()
            return False

        if not _comes_true(look):
            raise BackupDirectoryError(
                f"{store.path(directory)}: process 0 has made this directory, and it is not to be "
                f"seen here. {_SHOWS_OTHER_THINGS}"
            )

    def pass_over(self, step: int) -> None:
        """Tells other processes that a save is skipped; if they are gone, the next one says so."""
        with contextlib.suppress(SkippedError, PeerError):
            self._following.hear_order(step, 0)
            self._following.report()

    def restore(
        self, needs: Needs | None = None, step: int | None = None
    ) -> tuple[StoredBackup | None, str]:
        """Reads the backup that all processes restore, at the same time; see `FollowedReading`."""
        del step  # as process 0 says
        return self._reading.read(lambda nonce: self.read(nonce, needs)), ""

    def read(self, nonce: str, needs: Needs | None) -> StoredBackup:
        """Reads the backup that has a nonce, as far as this process needs it."""
        record, rank = self._record(nonce), self._board.peers.rank
        return read_backup(self._store, record, self._helpers, needs, rank=rank)

    def _record(self, nonce: str) -> BackupRecord:
        records: list[BackupRecord] = []

        def look() -> bool:
            markers = Markers(self._store)
            markers.read_markers()
            records[:] = [record for record in markers.records if record.nonce == nonce]
            return bool(records)

        if not _comes_true(look):
            raise BackupDirectoryError(
                f"{self._store.root}: process 0 restores a backup that is not to be seen here. "
                f"{_SHOWS_OTHER_THINGS}"
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
