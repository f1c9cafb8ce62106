"""What becomes of saves, and what they cost: the part of a checkpointer that is asked for it."""

from __future__ import annotations

import abc

from stepsave.engine.opening import Directory
from stepsave.engine.report import SaveReport
from stepsave.engine.saves import SaveLog
from stepsave.engine.step_times import StepSummary
from stepsave.format.records import BackupRecord, SaveStats
from stepsave.snapshot.capture import Capture

__all__ = ("Outcomes",)


class Outcomes(abc.ABC):
    """What can be asked of the saves of a checkpointer, after it was closed too."""

    _log: SaveLog
    _capture: Capture
    _directory: Directory

    @abc.abstractmethod
    def _settle(self) -> None:
        """Settles a save whose call was interrupted."""

    @property
    def committed(self) -> BackupRecord | None:
        """The newest valid backup; waits for saves in flight."""
        self.drain()
        return self._directory.committed

    @property
    def previous(self) -> BackupRecord | None:
        """The backup before it, if one is kept; waits likewise."""
        kept = self.kept
        return kept[0] if kept else None

    @property
    def kept(self) -> tuple[BackupRecord, ...]:
        """The backups before it that are kept, newest first; waits likewise."""
        self.drain()
        return self._directory.kept

    @property
    def closed(self) -> bool:
        return self._directory.is_released

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when every save so far is durable.

        Raises:
            SaveFailedError: If one failed and nobody was told yet.
            TimeoutError: If they have not ended within `timeout_s` seconds altogether.
        """
        self._settle()
        self._log.drain(timeout_s)
        self.raise_failed()

    def drain(self) -> None:
        """Returns when no save is in flight; failures stay to be raised."""
        self._settle()
        self._log.drain()

    def raise_failed(self, *, but_for_outages: bool = False) -> None:
        """Raises `SaveFailedError` if a save failed and nobody was told yet; see `SaveLog`."""
        self._log.raise_failed(but_for_outages=but_for_outages)

    @property
    def in_flight(self) -> int:
        """Number of saves that have not ended."""
        return len(self._log.in_flight)

    def stats(self) -> SaveStats:
        """Sums up what saving has cost; medians are over the last 1000 saves."""
        return self._log.stats(
            arena_count=self._capture.arena_count,
            arena_bytes=self._capture.arena_bytes,
            writer=self._directory.writer_name,
        )

    def report(self, *, steps: StepSummary | None = None) -> SaveReport:
        """What saving has cost, as a text, as figures, as a picture and as a trace.

        Args:
            steps: Of the loop, if it has timed them.
        """
        return SaveReport.of(self.stats(), self._log, steps)
