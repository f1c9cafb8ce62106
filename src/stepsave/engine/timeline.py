"""What saves did, and when: the last ones one by one, and all of them summed up."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Generator
from typing import Literal

__all__ = ("RECENT_SAVES", "Course", "Outcome", "SaveRecord", "Timeline")

RECENT_SAVES = 1000
"""Saves that are kept one by one, and as many that were skipped; bounds the memory they need."""

Outcome = Literal["in flight", "committed", "failed", "skipped"]


@dataclasses.dataclass(frozen=True, slots=True)
class SaveRecord:
    """What one save did. Times are in seconds since the checkpointer was opened.

    Attributes:
        step: The step that was passed to `save`.
        outcome: `"committed"`, `"failed"`, `"skipped"` or `"in flight"`.
        began_s: When `save` was called.
        stall_s: How long that call took; None if it was interrupted.
        write_began_s: When the first of its bytes could go to the disk; None if it did not come
            so far. From then on it also waits for what is still on its way from a device.
        write_ended_s: When all of them were durable there, and what is left is to commit.
        ended_s: When the save was committed, had failed, or was skipped; None while in flight.
        state_bytes: Bytes of state captured.
        changed_bytes: As in `SaveHandle`.
        written_bytes: As in `SaveHandle`.
    """

    step: int
    outcome: Outcome
    began_s: float
    stall_s: float | None = None
    write_began_s: float | None = None
    write_ended_s: float | None = None
    ended_s: float | None = None
    state_bytes: int = 0
    changed_bytes: int = 0
    written_bytes: int = 0

    @property
    def durable_s(self) -> float | None:
        """Time from the call of `save` until the commit; None if there was none."""
        if self.ended_s is None or self.outcome != "committed":
            return None
        return self.ended_s - self.began_s


class Course:
    """The same while it is going on, by `time.perf_counter`.

    Who calls `save` and who writes fill it in; each value is stored in one step.
    """

    __slots__ = tuple(field.name for field in dataclasses.fields(SaveRecord))

    def __init__(self, step: int, began_s: float) -> None:
        self.step = step
        self.began_s = began_s
        self.outcome: Outcome = "in flight"
        self.stall_s: float | None = None
        self.write_began_s: float | None = None
        self.write_ended_s: float | None = None
        self.ended_s: float | None = None
        self.state_bytes = self.changed_bytes = self.written_bytes = 0

    @contextlib.contextmanager
    def writing(self) -> Generator[None]:
        """Takes note of when its bytes are written; that they were, unless something is raised."""
        self.write_began_s = time.perf_counter()
        yield
        self.write_ended_s = time.perf_counter()

    def record(self, origin_s: float) -> SaveRecord:
        """Returns how far it has come, with times since `origin_s`."""
        # Before its times: of a save that ends meanwhile, some may be there, and no end.
        outcome = self.outcome
        return SaveRecord(
            self.step,
            outcome,
            self.began_s - origin_s,
            self.stall_s,
            _since(origin_s, self.write_began_s),
            _since(origin_s, self.write_ended_s),
            _since(origin_s, self.ended_s),
            self.state_bytes,
            self.changed_bytes,
            self.written_bytes,
        )


class Timeline:
    """The saves of one checkpointer.

    Who calls `save` counts what begins, the thread that writes what ends: no figure is changed by
    both.

    Attributes:
        opened_at_s: When it was opened, in seconds since the epoch.
        opened_s: The same by `time.perf_counter`.
        closed_s: When it was closed, likewise; None before.
        started: As in `SaveStats`, and so are the others of its names.
        durable_max_s: The longest time from a call of `save` until the commit.
        write_total_s: How long shards were being written, all saves together.
        unwritten_bytes: Bytes of state that committed saves did not write, as they lay there
            already.
    """

    def __init__(self) -> None:
        self.opened_at_s, self.opened_s = time.time(), time.perf_counter()
        self.closed_s: float | None = None
        self.started = self.committed = self.failed = self.state_bytes = 0
        self.changed_bytes = self.written_bytes = self.unwritten_bytes = 0
        self.stall_total_s = self.stall_max_s = self.write_total_s = 0.0
        self.durable_max_s = math.nan
        self._skipped_at_once = self._skipped_late = 0
        self._recent: collections.deque[Course] = collections.deque(maxlen=RECENT_SAVES)
        # Kept apart, so that many of them do not push out those that were made.
        self._recent_skips: collections.deque[Course] = collections.deque(maxlen=RECENT_SAVES)
        self._stalls_s: collections.deque[float] = collections.deque(maxlen=RECENT_SAVES)
        self._durables_s: collections.deque[float] = collections.deque(maxlen=RECENT_SAVES)
        # When the state was captured that a crash would go back to; that of the first `save` is
        # not known before, so until then it is the beginning.
        self._newest_s = self.opened_s
        self._worst_age_s = 0.0

    @property
    def skipped(self) -> int:
        return self._skipped_at_once + self._skipped_late

    def begin(self, course: Course) -> None:
        """Takes note of a save that was captured."""
        self._recent.append(course)
        self.started += 1
        self.state_bytes += course.state_bytes

    def stall(self, course: Course, stall_s: float) -> None:
        """Takes note of how long its caller was held up."""
        course.stall_s = stall_s
        self._stalls_s.append(stall_s)
        self.stall_total_s += stall_s
        self.stall_max_s = max(self.stall_max_s, stall_s)

    def skip(self, course: Course) -> None:
        """Takes note of a save that was not begun."""
        _end(course, "skipped")
        self._recent_skips.append(course)
        self._skipped_at_once += 1

    def skip_late(self, course: Course) -> None:
        """For the thread that writes: a save was given up, as another process skipped it."""
        _end(course, "skipped")
        self._skipped_late += 1

    def end(self, course: Course, ended_s: float, *, committed: bool) -> None:
        """For the thread that writes: a save has ended."""
        _end(course, "committed" if committed else "failed", ended_s)
        self.changed_bytes += course.changed_bytes
        self.written_bytes += course.written_bytes
        if course.write_began_s is not None and course.write_ended_s is not None:
            self.write_total_s += course.write_ended_s - course.write_began_s
        if not committed:
            self.failed += 1
            return
        self.committed += 1
        # Whole blocks are written, and checksums with them: perhaps more than there is of state.
        self.unwritten_bytes += max(0, course.state_bytes - course.written_bytes)
        durable_s = ended_s - course.began_s
        self._durables_s.append(durable_s)
        if not durable_s <= self.durable_max_s:  # the first is compared with NaN
            self.durable_max_s = durable_s
        self._worst_age_s = max(self._worst_age_s, ended_s - self._newest_s)
        self._newest_s = course.began_s

    def close(self) -> None:
        """Takes note that no save comes any more."""
        self.closed_s = time.perf_counter()

    def last_s(self) -> float:
        """When something was last heard of a save."""
        courses = list(self._recent)[-2:]
        times = [course.ended_s or course.began_s for course in courses]
        return max(times, default=self.opened_s)

    def age_s(self, at_s: float) -> float:
        """How old the state of the newest backup is; before the first, since when it is open."""
        return at_s - self._newest_s

    def worst_age_s(self, at_s: float) -> float:
        """How old that was at worst, until then: what a crash would have cost."""
        return max(self._worst_age_s, self.age_s(at_s))

    def stalls_s(self) -> list[float]:
        """How long callers of the last saves were held up."""
        return list(self._stalls_s)  # in one step: another thread may add one

    def durables_s(self) -> list[float]:
        """How long the last saves took until they were durable."""
        return list(self._durables_s)

    def records(self) -> list[SaveRecord]:
        """The last saves, and those that were skipped, in the order in which they began."""
        courses = list(self._recent) + list(self._recent_skips)
        return sorted(
            (course.record(self.opened_s) for course in courses), key=lambda each: each.began_s
        )


def _since(origin_s: float, at_s: float | None) -> float | None:
    return None if at_s is None else at_s - origin_s


def _end(course: Course, outcome: Outcome, ended_s: float | None = None) -> None:
    # In this order: what has an outcome has ended.
    course.ended_s = time.perf_counter() if ended_s is None else ended_s
    course.outcome = outcome
