"""How long the steps of a training take: all of them summed up, and the last ones one by one."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np

__all__ = ("RECENT_STEPS", "StepSummary", "StepTimes")

RECENT_STEPS = 5000
"""Steps that are kept one by one."""

_PIECE = 1024  # steps that are summed up at once: noting one must cost next to nothing
_LEAST_S = 1e-6
_RATIO = math.log(1.02)  # how much longer the steps of a class are than those of the one before
_CLASSES = math.ceil(math.log(1e10) / _RATIO)  # up to hours


@dataclasses.dataclass(frozen=True, slots=True)
class StepSummary:
    """The steps of a training. Times are in seconds.

    Attributes:
        count: How many were timed.
        total_s: How long they took together, what saves held them up included.
        p50_s: The median; of more than `RECENT_STEPS` steps to one in a hundred.
        p99_s: What one in a hundred takes longer than, likewise.
        max_s: The longest.
        ended_s: When each of the last ones ended, by `time.perf_counter`.
        took_s: How long each of these took.
    """

    count: int
    total_s: float
    p50_s: float
    p99_s: float
    max_s: float
    ended_s: tuple[float, ...]
    took_s: tuple[float, ...]


class StepTimes:
    """Times steps: `begin` a run of them, and `note` the end of each.

    For the thread of the training. It costs each step one reading of the clock and one entry of a
    list; the sums are made for many steps at once, and their memory is bounded.
    """

    def __init__(self) -> None:
        self._noted: list[float] = []  # the end of the last step that is summed up, and since then
        self._ended_s = self._took_s = np.empty(0)
        self._classes = np.zeros(_CLASSES, np.int64)
        self._count, self._total_s, self._max_s = 0, 0.0, 0.0

    def begin(self, *, at_once: bool) -> None:
        """Begins a run of steps: what was between the last one and this is no step.

        Args:
            at_once: Whether the first step begins now; else that is not known, and the first
                that is noted is where the second one begins.
        """
        self._sum_up()
        self._noted = [time.perf_counter()] if at_once else []

    def note(self) -> None:
        """Takes note that a step has ended."""
        self._noted.append(time.perf_counter())
        if len(self._noted) > _PIECE:
            self._sum_up()

    def summary(self) -> StepSummary | None:
        """Returns what is known of the steps so far; None if none was timed."""
        self._sum_up()
        if self._count == 0:
            return None
        return StepSummary(
            self._count,
            self._total_s,
            self._quantile_s(0.5),
            self._quantile_s(0.99),
            self._max_s,
            tuple(self._ended_s.tolist()),
            tuple(self._took_s.tolist()),
        )

    def _sum_up(self) -> None:
        noted = np.array(self._noted)
        if len(noted) < 2:
            return
        took_s = np.diff(noted)
        classes = np.log(np.maximum(took_s, _LEAST_S) / _LEAST_S) / _RATIO
        classes = np.minimum(classes.astype(np.int64), _CLASSES - 1)
        ended_s = np.concatenate([self._ended_s, noted[1:]])[-RECENT_STEPS:]
        all_took_s = np.concatenate([self._took_s, took_s])[-RECENT_STEPS:]
        counts = self._classes + np.bincount(classes, minlength=_CLASSES)
        # Here, so that what is interrupted before has counted nothing, and is counted later.
        self._noted = self._noted[-1:]
        self._ended_s, self._took_s, self._classes = ended_s, all_took_s, counts
        self._count += len(took_s)
        self._total_s += float(noted[-1] - noted[0])
        self._max_s = max(self._max_s, float(took_s.max()))

    def _quantile_s(self, share: float) -> float:
        """The smallest time that is not exceeded by such a share of the steps."""
        rank = math.ceil(share * self._count)
        if self._count <= len(self._took_s):
            return float(np.sort(self._took_s)[rank - 1])
        at = int(np.searchsorted(np.cumsum(self._classes), rank))
        return min(self._max_s, _LEAST_S * math.exp((at + 0.5) * _RATIO))
