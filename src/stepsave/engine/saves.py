"""Saves as their caller sees them: one by one, and all together."""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings

from stepsave.engine.timeline import Course, Timeline
from stepsave.errors import (
    BucketError,
    DirectoryBusyError,
    PeerError,
    SaveFailedError,
    SaveFailedWarning,
)
from stepsave.format.records import SaveStats
from stepsave.snapshot.arena import Claim
from stepsave.threads import Clock, Latch

__all__ = ("SaveHandle", "SaveLog")

_PASSING = (BucketError, PeerError)
"""What a training need not end for: the next save may go well."""


class SaveHandle:
    """One save, as its caller sees it.

    Attributes:
        step: The step that was passed to `save`.
        bytes: Bytes of state captured; 0 if skipped.
        changed_bytes: How many of these are not known to be what the same buffer held before; 0
            until they are on disk. What has always changed is not asked about at each save.
        written_bytes: Bytes written to the shards, whole blocks, for the same time.
        stall_s: How long the call of `save` took. If the arrays were still being computed (JAX
            dispatches ahead), waiting for them is in it.
        skipped: True if nothing was saved, because both arenas were in use, here or in another
            process.
        by_another: True if another process of the training saves, and this one has nothing to do.
    """

    def __init__(self, step: int, began_s: float) -> None:
        """Makes the handle of a save whose call began then, by `time.perf_counter`."""
        self.step = step
        self.course = Course(step, began_s)
        self.bytes = self.changed_bytes = self.written_bytes = 0
        self.skipped = self.by_another = False
        self.stall_s = 0.0
        self.claim = Claim()  # on the arena
        self._durable_s: float | None = None
        self._error: BaseException | None = None
        self._ended = Latch()
        self._is_told = False
        self._pid = os.getpid()

    def skip(self) -> None:
        """Says that nothing is saved."""
        self.skipped = True
        self._ended.open()

    def leave(self) -> int:
        """Says that another process saves; returns the step."""
        self.by_another = True
        self._ended.open()
        return self.step

    def __repr__(self) -> str:
        state = (
            "skipped"
            if self.skipped
            else "left to process 0"
            if self.by_another
            else "in flight"
            if not self._ended.is_open
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
        return self._ended.is_open

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when the save is durable, or at once if it was skipped.

        Raises:
            SaveFailedError: If it failed; the cause is attached.
            TimeoutError: If it has not ended within `timeout_s` seconds. It goes on.
        """
        if not self.wait_ended(timeout_s):
            raise _too_late(self.step, timeout_s)
        self.raise_error()

    def wait_ended(self, timeout_s: float | None) -> bool:
        """Waits until the save has ended, well or badly; tells whether it has.

        Raises:
            DirectoryBusyError: If nobody can say so: in a forked child, which has no such thread.
        """
        if not self._ended.is_open and os.getpid() != self._pid:
            raise DirectoryBusyError(
                f"The save of step {self.step} is made by the parent of this forked process, where "
                "alone its end is known. Wait for it there."
            )
        return self._ended.wait(timeout_s)

    @property
    def is_settled(self) -> bool:
        """Whether it has ended, and the user knows it if it failed."""
        return self.done and (self._error is None or self._is_told)

    def raise_error(self) -> None:
        """Raises `SaveFailedError` if the save failed."""
        if self._error is None:
            return
        try:
            raise self.failure() from self._error
        except SaveFailedError:
            # Told once it is raised, and not before: interrupted here, it is told again.
            self._is_told = True
            raise

    def tell_error(self) -> None:
        """Raises `SaveFailedError` if the save failed; warns if something was out of reach."""
        if not isinstance(self._error, _PASSING):
            self.raise_error()
            return
        text = f"stepsave: the save of step {self.step} is lost, and training goes on. The backup "
        try:
            warnings.warn(f"{text}before it is still valid. {self._error}", SaveFailedWarning, 5)
        except SaveFailedWarning:  # a filter has made an error of it
            self._is_told = True
            raise
        self._is_told = True

    def failure(self) -> SaveFailedError:
        """The error to raise for a failed save, to be chained to its cause."""
        error = self._error
        # The text of an OSError has the file in it, its `repr` has not.
        told = f"{type(error).__name__}: {error}".removesuffix(".")
        return SaveFailedError(
            f"The save of step {self.step} failed: {told}. The backup before it is "
            "still valid. Mend the cause; later saves start afresh."
        )

    def end(self, durable_s: float | None, error: BaseException | None) -> None:
        """Says how the save ended. For the writer."""
        self._durable_s = durable_s
        self._error = error
        self._ended.open()


class SaveLog:
    """The saves of one checkpointer: those in flight, and what all have cost.

    The caller adds saves and asks; the thread that writes counts what becomes of them.
    """

    def __init__(self) -> None:
        # In flight, or failed and nobody was told. Changed in single steps, by several threads.
        self._open: dict[SaveHandle, None] = {}
        self.last_failed = False
        self.timeline = Timeline()
        self.clocks: list[Clock] = []  # of the threads that work for it
        # Of backups that are uploaded: what nobody was told yet, and which one is there since when.
        self._failed_uploads: dict[tuple[int, BaseException], None] = {}
        self._uploaded: tuple[int, float] | None = None

    @property
    def in_flight(self) -> list[SaveHandle]:
        """The saves that have not ended, oldest first."""
        return [handle for handle in list(self._open) if not handle.done]

    def __contains__(self, handle: SaveHandle) -> bool:
        return handle in self._open

    def add(self, handle: SaveHandle) -> None:
        """Takes note of a save that was begun; a second time changes nothing."""
        if handle not in self._open:
            self._open[handle] = None
            handle.course.state_bytes = handle.bytes
            self.timeline.begin(handle.course)

    def add_cost(self, handle: SaveHandle) -> None:
        """Counts how long the caller was held up, or that the save was skipped."""
        handle.stall_s = time.perf_counter() - handle.course.began_s
        if handle.skipped:
            self.timeline.skip(handle.course)
        else:
            self.timeline.stall(handle.course, handle.stall_s)

    def count_skipped(self, handle: SaveHandle) -> None:
        """For the thread that writes: a save was given up, as another process skipped it."""
        self.timeline.skip_late(handle.course)

    def count_end(self, handle: SaveHandle, *, committed: bool) -> float:
        """For the thread that writes: a save has ended; returns how long that took."""
        course = handle.course
        course.changed_bytes, course.written_bytes = handle.changed_bytes, handle.written_bytes
        ended_s = time.perf_counter()
        self.timeline.end(course, ended_s, committed=committed)
        self.last_failed = not committed
        return ended_s - course.began_s

    def drain(self, timeout_s: float | None = None) -> None:
        """Returns when no save is in flight; failures stay untold.

        Raises:
            TimeoutError: If they have not ended within `timeout_s` seconds altogether.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for handle in list(self._open):
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if not handle.wait_ended(left_s):
                raise _too_late(handle.step, timeout_s)

    def raise_failed(self, *, but_for_outages: bool = False) -> None:
        """Raises `SaveFailedError` if a save failed and the user was not told yet.

        Args:
            but_for_outages: Whether to warn only, if a bucket or another process was out of reach.
        """
        for handle in list(self._open):
            if handle.is_settled:
                self._open.pop(handle, None)
            elif handle.done and but_for_outages:
                handle.tell_error()
            elif handle.done:
                handle.raise_error()
        for failed in list(self._failed_uploads):
            self._tell_upload(*failed, warns=but_for_outages)

    def note_upload(self, step: int, saved_at_s: float) -> None:
        """For the thread that uploads: a backup is in the bucket, saved then."""
        self._uploaded = step, saved_at_s

    def note_failed_upload(self, step: int, error: BaseException) -> None:
        """For the same: it could not be brought there."""
        self._failed_uploads[step, error] = None

    def _tell_upload(self, step: int, error: BaseException, *, warns: bool) -> None:
        there = "none" if self._uploaded is None else f"that of step {self._uploaded[0]}"
        text = (
            f"The backup of step {step} could not be uploaded: {error} It is valid on the local "
            f"disk; the newest in the bucket is {there}."
        )
        try:
            _raise_or_warn(text, error, warns=warns)
        except (SaveFailedError, SaveFailedWarning):
            # Told once it is raised, and not before: interrupted here, it is told again.
            self._failed_uploads.pop((step, error), None)
            raise
        self._failed_uploads.pop((step, error), None)

    def stats(self, *, arena_count: int, arena_bytes: int, writer: str) -> SaveStats:
        """Sums up; medians are over the last thousand saves."""
        timeline = self.timeline
        return SaveStats(
            started=timeline.started,
            committed=timeline.committed,
            failed=timeline.failed,
            skipped=timeline.skipped,
            state_bytes=timeline.state_bytes,
            changed_bytes=timeline.changed_bytes,
            written_bytes=timeline.written_bytes,
            stall_total_s=timeline.stall_total_s,
            stall_median_s=_median(timeline.stalls_s()),
            stall_max_s=timeline.stall_max_s,
            durable_median_s=_median(timeline.durables_s()),
            arena_count=arena_count,
            arena_bytes=arena_bytes,
            writer=writer,
            remote_step=None if self._uploaded is None else self._uploaded[0],
            remote_age_s=math.nan if self._uploaded is None else time.time() - self._uploaded[1],
        )


def _too_late(step: int, timeout_s: float | None) -> TimeoutError:
    return TimeoutError(
        f"The save of step {step} has not ended after {timeout_s} s. It goes on: wait again."
    )


def _raise_or_warn(text: str, error: BaseException, *, warns: bool) -> None:
    if not warns or not isinstance(error, _PASSING):
        raise SaveFailedError(text) from error
    warnings.warn(f"stepsave: {text}", SaveFailedWarning, 6)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan
