"""A backup directory, from opening to letting go of it."""

from __future__ import annotations

import contextlib

from stepsave.engine.agreed_reading import LedReading
from stepsave.engine.agreement import Leading
from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.commit import CommitProtocol
from stepsave.engine.extents import Needs
from stepsave.engine.newest import restore_newest
from stepsave.engine.peers import Board
from stepsave.engine.reader import StoredBackup, read_backup
from stepsave.engine.retention import Retention
from stepsave.engine.saves import SaveLog
from stepsave.engine.writer import SaveRequest, Writer, WriterKind, choose_direct
from stepsave.errors import (
    BackupDirectoryError,
    CheckpointerClosedError,
    DirectoryBusyError,
    PeerError,
)
from stepsave.format.records import BackupRecord
from stepsave.store.bucket import BucketStore
from stepsave.store.lock import DirectoryLock
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = ("BackupDirectory",)


class BackupDirectory:
    """What a checkpointer has of its directory. For the keeper's thread, but for properties.

    Attributes:
        place: The directory, or the URL.
        protocol: Which backups are valid there.
        writer_name: Which writer was chosen.
        saves_here: True: what is saved is written by this process.
    """

    saves_here = True

    def __init__(
        self, store: Store, log: SaveLog, helpers: Crew, board: Board | None = None
    ) -> None:
        """Touches nothing yet.

        Args:
            store: The directory or the bucket.
            log: Told how saves end.
            helpers: Threads that read and write.
            board: Where to tell other processes of the training what was opened and restored.
        """
        self._board = board
        shares = board is not None and board.peers.share_saves
        self._leading = Leading(board) if board is not None and shares else None
        self._reading = None if board is None else LedReading(board)
        self._store = store
        self.place = str(store.root)
        self._log = log
        self._helpers = helpers
        self._lock = store.make_hold()

    def open(self, writer: WriterKind, lanes: int, retention: Retention) -> int:
        """Opens it, and tells other processes of the training; see `_open`."""
        board = self._board
        if board is None:
            return self._open(writer, lanes, retention)
        try:
            step = self._open(writer, lanes, retention)
        except BaseException as e:
            board.say("open", error=str(e))
            raise
        board.say("open", error="", step=step, nonce=self._lock.nonce, writer=self.writer_name)
        return step

    def _open(self, writer: WriterKind, lanes: int, retention: Retention) -> int:
        """Makes the directory if needed, locks it, and sees what is in it.

        Returns:
            The step of the newest valid backup; -1 if there is none.

        Raises:
            BackupDirectoryError: If it cannot be used, or holds something else.
            DirectoryBusyError: If it is in use.
        """
        store = self._store
        store.create()
        self._lock.reserve()
        # Before the lock file is made: a directory that is refused must stay as it was.
        is_shared = self._leading is not None
        self.protocol = _make_protocol(store, retention, is_shared=is_shared)
        self._lock.acquire()
        if isinstance(self.protocol, CommitProtocol):
            assert isinstance(self._lock, DirectoryLock)
            self.protocol.check_place = self._lock.check_in_place
        self.protocol.read_markers()  # as they are now that nobody else can change them
        direct = choose_direct(store, writer)
        self.writer_name = "direct" if direct else "tensorstore"
        self._writer = Writer(
            store,
            self.protocol,
            self._log,
            self._helpers,
            direct=direct,
            lanes=lanes,
            leading=self._leading,
        )
        return -1 if self.committed is None else self.committed.step

    @property
    def committed(self) -> BackupRecord | None:
        """The newest valid backup."""
        return self.protocol.committed

    @property
    def kept(self) -> tuple[BackupRecord, ...]:
        """The backups before it that are kept, newest first."""
        return self.protocol.kept

    @property
    def is_held(self) -> bool:
        """Whether it is this process's to use."""
        return self._lock.is_held

    @property
    def is_released(self) -> bool:
        return self._lock.is_released

    def check_held(self) -> None:
        """Raises unless it is this process's to use."""
        if self.is_released:
            raise CheckpointerClosedError(
                f"The checkpointer of {self._store.root} is closed. Make a new one."
            )
        if not self.is_held:
            raise DirectoryBusyError(
                f"{self._store.root}: this checkpointer belongs to the parent of this forked "
                "process. Use it there, or make one with another directory."
            )

    def check_writable(self) -> None:
        """Raises if nothing can be saved here on principle."""

    def write(self, request: SaveRequest) -> None:
        """Makes a save durable, or says in its handle why it is not."""
        self._writer.write(request)

    def pass_over(self, step: int) -> None:
        """Tells other processes that a save is skipped; if they are gone, the next one says so."""
        self._writer.pass_over(step)

    def upload(self) -> None:
        """Nothing to do: there is one place."""

    def restore(
        self, needs: Needs | None = None, step: int | None = None
    ) -> tuple[StoredBackup | None, str]:
        """Reads the newest backup, with other processes if there are any; see `restore_newest`."""

        def read_own(record: BackupRecord) -> StoredBackup:
            return read_backup(self._store, record, self._helpers, needs)

        reading = self._reading
        if reading is None:
            return restore_newest(self.place, self.protocol, read_own, step)

        def read_all(record: BackupRecord) -> StoredBackup:
            return reading.read(record, lambda: read_own(record))

        try:
            found, lost = restore_newest(self.place, self.protocol, read_all, step)
        except BaseException as e:
            with contextlib.suppress(PeerError):  # then they find out by themselves
                reading.end(None, str(e))
            raise
        reading.end(found)
        return found, lost

    def mark_ended(self) -> None:
        """Notes with the newest backup that its training has come to its end."""
        self.protocol.mark_ended()

    def delete_backup(self) -> None:
        """Removes every backup, and nothing that stepsave did not write."""
        self.protocol.delete_all()

    def release(self, *, remove: bool = False) -> None:
        """Lets go of it.

        Args:
            remove: Whether to remove the lock file too, and the directory if nothing is left.
        """
        if self._leading is not None and self.is_held:
            with contextlib.suppress(PeerError):  # nobody is there any more to be told
                self._leading.close()
        self._lock.release(remove=remove)
        if remove:
            self._store.remove_empty_root()


def _make_protocol(
    store: Store, retention: Retention, *, is_shared: bool
) -> CommitProtocol | BucketCommit:
    if isinstance(store, BucketStore):
        return BucketCommit(store, retention)
    try:
        return CommitProtocol(store, retention, is_shared=is_shared)
    except PermissionError as e:
        raise BackupDirectoryError(
            f"{store.root}: cannot look into the backup directory: {e}. Make it readable or "
            "choose another."
        ) from e
