"""Which backups in a directory are valid, as its markers say."""

from __future__ import annotations

from stepsave.engine.known_files import COMMIT, PREVIOUS
from stepsave.errors import CorruptBackupError
from stepsave.format.marker import MARKER_LIMIT_BYTES, decode_marker
from stepsave.format.records import BackupRecord
from stepsave.store.local import LocalStore

__all__ = ("Markers", "Problem")

Problem = CorruptBackupError | OSError
"""Why a marker cannot be read."""


class Markers:
    """The markers of a directory, as they were when they were read.

    Attributes:
        committed: The newest valid backup.
        previous: The one before it, if it is kept.
        problems: Markers that cannot be read, and why.
    """

    def __init__(self, store: LocalStore) -> None:
        """Reads nothing yet."""
        self._store = store
        self.committed: BackupRecord | None = None
        self.previous: BackupRecord | None = None
        self.problems: dict[str, Problem] = {}

    def read_markers(self) -> None:
        """Takes from disk which backups are valid; what cannot be read is in `problems`."""
        found = {name: self.on_disk(name) for name in (COMMIT, PREVIOUS)}
        self.problems = {name: e for name, e in found.items() if isinstance(e, Exception)}
        committed, previous = found.values()
        self.committed = committed if isinstance(committed, BackupRecord) else None
        self.previous = previous if isinstance(previous, BackupRecord) else None

    def on_disk(self, name: str) -> BackupRecord | Problem | None:
        """What a marker says now; None if there is none."""
        try:
            encoded = self._store.read(name, MARKER_LIMIT_BYTES)
            return decode_marker(encoded, str(self._store.path(name)))
        except FileNotFoundError:
            return None
        except (CorruptBackupError, OSError) as e:
            return e

    def fall_back(self) -> None:
        """Declares the newest backup unreadable: the previous one is the newest now.

        Nothing on disk is touched, in case the fault passes.
        """
        assert self.previous is not None
        self.committed, self.previous = self.previous, None
        self.problems.pop(COMMIT, None)
