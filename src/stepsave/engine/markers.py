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
        previous: The one before it, if it is kept.
        problems: Markers that cannot be read, and why.
        claim: What the marker says, if it is that of a bucket.
    """

    def __init__(self, store: Store) -> None:
        """Reads nothing yet."""
        self._store = store
        self.committed: BackupRecord | None = None
        self.previous: BackupRecord | None = None
        self.problems: dict[str, Problem] = {}
        self.claim: Claim | None = None

    def read_markers(self) -> None:
        """Takes from the store which backups are valid; what cannot be read is in `problems`."""
        commit = self.on_disk(COMMIT)
        # That of a bucket, or of a copy of one, says all.
        previous = commit.previous if isinstance(commit, Claim) else self.on_disk(PREVIOUS)
        found = {COMMIT: commit, PREVIOUS: previous}
        self.problems = {name: e for name, e in found.items() if isinstance(e, Exception)}
        self.claim = commit if isinstance(commit, Claim) else None
        committed = commit.committed if isinstance(commit, Claim) else commit
        self.committed = committed if isinstance(committed, BackupRecord) else None
        self.previous = previous if isinstance(previous, BackupRecord) else None

    def on_disk(self, name: str) -> BackupRecord | Claim | Problem | None:
        """What a marker says now; None if there is none."""
        try:
            encoded = self.read_marker(name)
            return None if encoded is None else decode_marker(encoded, str(self._store.path(name)))
        except (CorruptBackupError, OSError) as e:
            return e

    def read_marker(self, name: str) -> bytes | None:
        """Reads a marker; None if there is none."""
        try:
            return self._store.read(name, MARKER_LIMIT_BYTES)
        except FileNotFoundError:
            return None

    def fall_back(self) -> None:
        """Declares the newest backup unreadable: the previous one is the newest now.

        Nothing on disk is touched, in case the fault passes.
        """
        assert self.previous is not None
        self.committed, self.previous = self.previous, None
        self.problems.pop(COMMIT, None)
