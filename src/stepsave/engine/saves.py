"""Saves as their caller sees them: one by one, and all together."""

from __future__ import annotations

import collections
import math
import statistics
import threading

from stepsave.errors import SaveFailedError
from stepsave.format.records import SaveStats

__all__ = ("SaveHandle", "SaveLog")

_STATS_WINDOW = 1000  # saves over which medians are taken; bounds the memory they need


class SaveHandle:
    """One save, as its caller sees it.

    Attributes:
        step: The step that was passed to `save`.
        bytes: Bytes of state captured; 0 if skipped.
        stall_s: How long the call of `save` took. If the arrays were still being computed (JAX
            dispatches ahead), waiting for them is in it.
        skipped: True if nothing was saved, because both arenas were in use.
    """

    def __init__(self, step: int, size_bytes: int, *, skipped: bool = False) -> None:
        self.step = step
        self.bytes = size_bytes
        self.skipped = skipped
        self.stall_s = 0.0
        self._durable_s: float | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._reported = False
        if skipped:
            self._ended.set()

    def __repr__(self) -> str:
        state = (
            "skipped"
            if self.skipped
            else "in flight"
            if not self._ended.is_set()
            else "failed"
            if self._error
            else f"durable after {self._durable_s:.3f} s"
        )
        return f"<SaveHandle of step {self.step}: {state}>"

    @property
    def durable_s(self) -> float | None:
        """Time from the call of `save` until the commit; None before, or if it failed."""
        return self._durable_s

    @property
    def done(self) -> bool:
        """Whether the save has ended, well or badly."""
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when the save is durable, or at once if it was skipped.

        Raises:
            SaveFailedError: If it failed; the cause is attached.
            TimeoutError: If it has not ended within `timeout_s` seconds. It goes on.
        """
        if not self.wait_ended(timeout_s):
            raise TimeoutError(f"The save of step {self.step} has not ended after {timeout_s} s.")
        self._reported = True
        if self._error is not None:
            raise self.failure() from self._error

    def wait_ended(self, timeout_s: float | None) -> bool:
        """Waits until the save has ended, well or badly; tells whether it has."""
        return self._ended.wait(timeout_s)

    def take_error(self) -> BaseException | None:
        """Returns the error of a failed save once, unless `wait` has raised it already."""
        if not self._ended.is_set() or self._reported or self._error is None:
            return None
        self._reported = True
        return self._error

    def failure(self) -> SaveFailedError:
        """The error to raise for a failed save, to be chained to its cause."""
        return SaveFailedError(
            f"The save of step {self.step} failed: {self._error!r}. The backup before it is "
            "still valid. Mend the cause; later saves start afresh."
        )

    def end(self, durable_s: float | None, error: BaseException | None) -> None:
        """Says how the save ended. For the writer."""
        self._durable_s = durable_s
        self._error = error
        self._ended.set()


class SaveLog:
    """The saves of one checkpointer: those in flight, and what all have cost."""

    def __init__(self) -> None:
        self._in_flight: list[SaveHandle] = []
        self._failed: list[SaveHandle] = []  # until the user was told
        self._has_failed = False
        self._counts: collections.Counter[str] = collections.Counter()
        self._stalls_s: collections.deque[float] = collections.deque(maxlen=_STATS_WINDOW)
        self._durables_s: collections.deque[float] = collections.deque(maxlen=_STATS_WINDOW)
        self._stall_total_s = self._stall_max_s = 0.0

    @property
    def in_flight(self) -> list[SaveHandle]:
        """The saves that have not ended, oldest first."""
        self._settle()
        return list(self._in_flight)

    @property
    def last_failed(self) -> bool:
        """Whether the last save that ended failed."""
        self._settle()
        return self._has_failed

    def add(self, handle: SaveHandle) -> None:
        """Takes note of a save that was begun, or skipped."""
        if handle.skipped:
            self._counts["skipped"] += 1
            return
        self._in_flight.append(handle)
        self._counts["started"] += 1
        self._counts["bytes"] += handle.bytes
        self._stalls_s.append(handle.stall_s)
        self._stall_total_s += handle.stall_s
        self._stall_max_s = max(self._stall_max_s, handle.stall_s)

    def drain(self) -> None:
        """Returns when no save is in flight; failures stay untold."""
        for handle in self._in_flight:
            handle.wait_ended(None)

    def raise_failed(self) -> None:
        """Raises `SaveFailedError` if a save failed and the user was not told yet."""
        if not self._in_flight and not self._failed:
            return
        self._settle()
        while self._failed:
            handle = self._failed.pop(0)
            error = handle.take_error()
            if error is not None:
                raise handle.failure() from error

    def stats(self, *, arena_count: int, arena_bytes: int, writer: str) -> SaveStats:
        """Sums up; medians are over the last thousand saves."""
        self._settle()
        counts = self._counts
        return SaveStats(
            started=counts["started"],
            committed=counts["committed"],
            failed=counts["failed"],
            skipped=counts["skipped"],
            state_bytes=counts["bytes"],
            stall_total_s=self._stall_total_s,
            stall_median_s=_median(self._stalls_s),
            stall_max_s=self._stall_max_s,
            durable_median_s=_median(self._durables_s),
            arena_count=arena_count,
            arena_bytes=arena_bytes,
            writer=writer,
        )

    def _settle(self) -> None:
        """Counts the saves that have ended. They end in the order in which they began."""
        while self._in_flight and self._in_flight[0].done:
            handle = self._in_flight.pop(0)
            self._has_failed = handle.durable_s is None
            if handle.durable_s is None:
                self._counts["failed"] += 1
                self._failed.append(handle)
            else:
                self._counts["committed"] += 1
                self._durables_s.append(handle.durable_s)


def _median(values: collections.deque[float]) -> float:
    return statistics.median(values) if values else math.nan
