"""How processes restore the same backup: what one of them cannot read, none takes.

Each reads its part only, so a flipped bit may show to one of them. Process 0 names a backup, all
read it at the same time and say what came of it; then process 0 says that it is taken, or names the
one before it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from stepsave.engine.agreement import patience_s
from stepsave.engine.peers import Board
from stepsave.engine.reader import StoredBackup
from stepsave.errors import BackupDirectoryError, BucketError, CorruptBackupError
from stepsave.format.records import BackupRecord

__all__ = ("FollowedReading", "LedReading")

_READ_S = 3600.0
"""How long all of them together may take to read a backup, of which nobody knows the size yet."""


class LedReading:
    """For process 0, one restore after the other."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._number = 0

    def read(self, record: BackupRecord, read_own: Callable[[], StoredBackup]) -> StoredBackup:
        """Has all read a backup; returns what this process needs of it.

        Raises:
            CorruptBackupError: If another process cannot read its part.
            BucketError: If the backup is out of another one's reach.
            PeerError: If one says nothing.
            Exception: What `read_own` has raised.
        """
        number = self._number
        self._number += 1
        self._board.say(f"reads {number}", nonce=record.nonce)
        size_bytes = record.shard_bytes * len(record.shard_digests)
        try:
            found = read_own()
        finally:
            limit_s = min(patience_s(size_bytes), _READ_S)
            told = {
                rank: self._board.hear(f"read {number} {rank}", limit_s, who=rank)
                for rank in range(1, self._board.peers.count)
            }
        for rank, one in told.items():
            if one["error"]:
                kind = BucketError if one["is_away"] else CorruptBackupError
                what = f"can read the backup, process {rank} cannot. All must see all of it"
                raise kind(self._board.text(what, one["error"]))
        return found

    def end(self, found: StoredBackup | None, error: str = "") -> None:
        """Says what came of a restore."""
        number = self._number
        self._number += 1
        ended = found is not None and found.ended
        self._board.say(f"reads {number}", is_found=found is not None, ended=ended, error=error)


class FollowedReading:
    """For the others."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._numbers = itertools.count()

    def read(self, read_own: Callable[[str], StoredBackup]) -> StoredBackup | None:
        """Returns what this process needs of the backup that all take.

        Args:
            read_own: Reads that of the backup with a nonce.

        Raises:
            BackupDirectoryError: If process 0 could restore none.
            PeerError: If it says nothing.
        """
        found: StoredBackup | None = None
        for number in self._numbers:
            told = self._board.hear(f"reads {number}", _READ_S)
            if "nonce" not in told:
                if told["error"]:
                    raise BackupDirectoryError(f"Process 0 could not restore: {told['error']}")
                if found is None or not told["is_found"]:
                    return None
                # Each disk has a marker of its own, and a crash may come between two of them. Were
                # the training over for one process and not for another, that one would wait.
                return dataclasses.replace(found, ended=told["ended"])
            found, error, is_away = None, "", False
            try:
                found = read_own(told["nonce"])
            except Exception as e:  # noqa: BLE001  process 0 decides what comes of it
                error, is_away = f"{type(e).__name__}: {e}", isinstance(e, BucketError)
            rank = self._board.peers.rank
            self._board.say(f"read {number} {rank}", error=error, is_away=is_away)
        raise AssertionError
