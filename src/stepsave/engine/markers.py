"""Which backups in a directory are valid, as its markers say."""

from __future__ import annotations

from stepsave.engine.known_files import COMMIT, PREVIOUS
from stepsave.errors import CorruptBackupError
from stepsave.format.marker import MARKER_LIMIT_BYTES, decode_marker
from stepsave.format.records import BackupRecord, Claim
from stepsave.store.places import Store

__all__ = ("Markers", "Problem")

Problem = CorruptBackupError | OSError
"""Why a marker cannot be read."""


class Markers:
    """The markers of a directory, as they were when they were read.

    Attributes:
        committed: The newest valid backup.
        kept: Those before it that are kept, newest first.
        problems: Markers that cannot be read, and why.
        claim: What the marker says, if it is that of a bucket.
    """

    def __init__(self, store: Store) -> None:
        """Reads nothing yet."""
        self._store = store
        self.committed: BackupRecord | None = None
        self.kept: tuple[BackupRecord, ...] = ()
        self.problems: dict[str, Problem] = {}
        self.claim: Claim | None = None

    @property
    def previous(self) -> BackupRecord | None:
        """The one before the newest, if it is kept."""
        return self.kept[0] if self.kept else None

    @property
    def records(self) -> tuple[BackupRecord, ...]:
        """All valid backups, newest first."""
        return self.kept if self.committed is None else (self.committed, *self.kept)

    def read_markers(self) -> None:
        """Takes from the store which backups are valid; what cannot be read is in `problems`."""
        commit = self.on_disk(COMMIT)
        self.claim = commit if isinstance(commit, Claim) else None
        # That of a bucket, or of a copy of one, says all.
        if isinstance(commit, Claim):
            newest, kept = commit.backups[:1], commit.backups[1:]
        else:
            newest, kept = commit, self.on_disk(PREVIOUS)
        found = {COMMIT: newest, PREVIOUS: kept}
        self.problems = {name: e for name, e in found.items() if isinstance(e, Exception)}
        self.committed = newest[0] if isinstance(newest, tuple) and newest else None
        self.kept = kept if isinstance(kept, tuple) else ()
        if self.committed is not None:
            # COMMIT is replaced first. After a fall back that was cut short there, PREVIOUS still
            # names the newest too, and those that could not be read.
            last = self.committed.step
            self.kept = tuple(record for record in self.kept if record.step < last)

    def on_disk(self, name: str) -> tuple[BackupRecord, ...] | Claim | Problem:
        """What a marker says now; no backup if there is none."""
        try:
            encoded = self.read_marker(name)
            return () if encoded is None else decode_marker(encoded, str(self._store.path(name)))
        except (CorruptBackupError, OSError) as e:
            return e

    def read_marker(self, name: str) -> bytes | None:
        """Reads a marker; None if there is none."""
        try:
            return self._store.read(name, MARKER_LIMIT_BYTES)
        except FileNotFoundError:
            return None

    def fall_back(self, record: BackupRecord) -> None:
        """Declares those newer than a kept backup unreadable: it is the newest now.

        Nothing on disk is touched, in case the fault passes.
        """
        self.committed, self.kept = record, self.kept[self.kept.index(record) + 1 :]
        self.problems.pop(COMMIT, None)
