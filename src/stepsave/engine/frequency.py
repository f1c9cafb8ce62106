"""When to save: by time, or as often as a budget allows; for `fit` and for loops of one's own.

A training may be far ahead of its devices: JAX has hundreds of steps under way when the first has
not been computed. What a clock shows between two steps then says nothing, and a save waits until
all of it is computed, which is no cost of the save. So time is only taken when nothing is under
way (`wait`), which is rarely asked for; in between steps are counted.
"""

from __future__ import annotations

import collections
import math
import numbers
import statistics
import time
from collections.abc import Callable
from typing import Any

from stepsave.engine.arguments import parse_time_s
from stepsave.engine.interval import Interval
from stepsave.engine.saves import SaveHandle

__all__ = ("MAX_OVERHEAD", "SaveFrequency", "check_auto")

MAX_OVERHEAD = 0.01

_FIRST_STEPS = 2  # timed before the first save
_LAPS = 5  # from save to save; by their median it is known how long a step takes
_NEWS = 2.0  # a choice that differs by this factor from the one that was told is told too
_AHEAD = 0.9  # of the time until a save is due is slept away by steps; then the clock is read

_BOUNDS = {
    "budget": "the budget (max_overhead={max_overhead:g}) allows no more",
    "disk": "saves take so long to be durable",
    "failures": "it loses least to failures (mtbf_s={mtbf_s:g}, Young/Daly)",
}

Clock = Callable[[], float]


def _nothing() -> None:
    """Waits for nothing: what was called has been computed."""


class SaveFrequency:
    """Says when a save is due: by itself never; see `of`. For the thread that trains.

    Example:
        ```python
        frequency = stepsave.SaveFrequency.of("auto", max_overhead=0.01)
        for step in range(steps):
            train()
            if frequency.is_due(step):
                frequency.note(saver.save(step, state))
        ```
    """

    @staticmethod
    def of(
        every: str,
        *,
        max_overhead: float = MAX_OVERHEAD,
        mtbf_s: float | None = None,
        wait: Callable[[], object] = _nothing,
        clock: Clock = time.perf_counter,
    ) -> SaveFrequency:
        """Returns what says when a save is due.

        Args:
            every: A time from save to save, such as `"30s"`, `"5min"` or `"1.5h"`; or `"auto"`.
            max_overhead: With `"auto"`, share of the time of the training's steps that saves may
                cost.
            mtbf_s: With `"auto"`, mean time between failures in seconds, if known: then no more
                often than pays.
            wait: Returns when the steps so far have been computed, if they are only dispatched:
                with JAX, `lambda: jax.block_until_ready(state)`.
            clock: Seconds that only ever grow.

        Raises:
            ValueError: If an argument is invalid.
        """
        seconds = parse_time_s(every)
        if every != "auto" and not seconds:
            raise ValueError(
                f"Invalid value for argument `every`. Received: every={every!r}. Expected a time "
                "such as '30s', '5min' or '1.5h', or 'auto'."
            )
        check_auto(every, max_overhead, mtbf_s)
        if seconds:
            return _EveryTime(seconds, wait, clock)
        return _Auto(max_overhead, mtbf_s, wait, clock)

    def is_due(self, step: int) -> bool:
        """Whether to save, when so many steps have been made. To be asked after each."""
        del step
        return False

    def settle(self) -> None:
        """Waits until the steps so far are computed, so that a save does not. `is_due` does it."""

    def note(self, handle: SaveHandle) -> None:
        """Takes note of a save, when the call of it has returned."""

    def pause(self) -> None:
        """Takes note that what follows is no training, such as a validation."""

    def go_on(self) -> None:
        """Takes note that training goes on."""

    def close(self) -> None:
        """Lets go of what other processes were asked by."""

    @property
    def text(self) -> str:
        """What it has chosen and why, in one line; empty if there is nothing to choose."""
        return ""

    def news(self) -> str:
        """`text`, if somebody should be told: once, and when the choice has changed much."""
        return ""


class _Timed(SaveFrequency):
    """By a clock, which is only right when no step is under way."""

    def __init__(self, wait: Callable[[], object], clock: Clock) -> None:
        self._wait = wait
        self._clock = clock
        self._settled_s: float | None = None

    def settle(self) -> None:
        self._wait()
        self._settled_s = self._clock()

    def _begin_if(self, *, is_due: bool) -> bool:
        if not is_due:
            self._settled_s = None  # one that comes later begins later
        return is_due

    def _take_begin(self, handle: SaveHandle) -> float:
        """When a save began that was called just now."""
        begin_s, self._settled_s = self._settled_s, None
        return self._clock() - handle.stall_s if begin_s is None else begin_s


class _EveryTime(_Timed):
    """Due when so much time has passed since the last save began."""

    def __init__(self, every_s: float, wait: Callable[[], object], clock: Clock) -> None:
        super().__init__(wait, clock)
        self._every_s = every_s
        self._begun_s = clock()
        self._look_step = 0  # at which to wait, as the clock may be ahead of it
        self._seen: tuple[int, float] | None = None  # a step, and when it was computed

    def is_due(self, step: int) -> bool:
        has_passed = self._clock() - self._begun_s >= self._every_s
        if not has_passed and (self._wait is _nothing or step < self._look_step):
            return False
        self.settle()
        assert self._settled_s is not None
        self._look_step = step + self._steps_left(step, self._settled_s)
        return self._begin_if(is_due=self._settled_s - self._begun_s >= self._every_s)

    def _steps_left(self, step: int, now_s: float) -> int:
        seen, self._seen = self._seen, (step, now_s)
        if seen is None or now_s <= seen[1]:
            return 1
        left_s = self._every_s - (now_s - self._begun_s)
        return max(1, int(left_s * _AHEAD * (step - seen[0]) / (now_s - seen[1])))

    def note(self, handle: SaveHandle) -> None:
        """Counts from the begin of the save, also if it was skipped."""
        self._begun_s = self._take_begin(handle)


class _Auto(_Timed):
    """Due after so many steps as take an interval; see `Interval`."""

    def __init__(
        self,
        max_overhead: float,
        mtbf_s: float | None,
        wait: Callable[[], object],
        clock: Clock,
    ) -> None:
        super().__init__(wait, clock)
        self._numbers = {"max_overhead": max_overhead, "mtbf_s": mtbf_s or math.nan}
        self._interval = Interval(max_overhead, mtbf_s)
        self._paces_s: collections.deque[float] = collections.deque(maxlen=_LAPS)
        self._due_step: int | None = None
        self._handle: SaveHandle | None = None  # of the last save
        self._lap: tuple[int, float] = (0, 0.0)  # where it began, when training went on then
        self._paused_s = 0.0
        self._paused_at_s: float | None = None
        self._told_s = 0.0

    def is_due(self, step: int) -> bool:
        if self._due_step is None:  # the first step, which compiles, is not counted
            self._wait()
            self._begin_lap(step, self._clock())
            self._due_step = step + _FIRST_STEPS
            return False
        if step < self._due_step:
            return False
        self.settle()
        # None is begun before the last one is durable: it would wait for it, or be skipped.
        return self._begin_if(is_due=self._handle is None or self._handle.done)

    def note(self, handle: SaveHandle) -> None:
        began_s, step = self._take_begin(handle), handle.step
        if not handle.skipped:
            self._end_lap(step, began_s)
            before, self._handle = self._handle, handle
            durable_s = None if before is None else before.durable_s
            self._interval.learn(handle.stall_s, durable_s)
            self._begin_lap(step, self._clock())
        self._due_step = step + self._steps

    def pause(self) -> None:
        self._wait()
        self._paused_at_s = self._clock()

    def go_on(self) -> None:
        if self._paused_at_s is not None:
            self._paused_s += self._clock() - self._paused_at_s
            self._paused_at_s = None

    def _begin_lap(self, step: int, now_s: float) -> None:
        self._lap, self._paused_s = (step, now_s), 0.0

    def _end_lap(self, step: int, now_s: float) -> None:
        first, begun_s = self._lap
        took_s = now_s - begun_s - self._paused_s
        if step > first and took_s > 0:
            self._paces_s.append(took_s / (step - first))

    @property
    def _step_s(self) -> float:
        return statistics.median(self._paces_s) if self._paces_s else 0.0

    @property
    def _steps(self) -> int:
        """How many steps take as long as the interval, the save left out."""
        interval, step_s = self._interval, self._step_s
        left_s = interval.seconds - interval.cost_s
        return max(1, math.ceil(left_s / step_s)) if step_s else 1

    @property
    def text(self) -> str:
        interval = self._interval
        if not interval.is_settled:
            return "save_freq='auto': what saves cost is not known yet."
        durable = _spell(interval.durable_s)
        return (
            f"save_freq='auto': a save every {self._steps} steps ({_spell(interval.seconds)}), as "
            f"{_BOUNDS[interval.bound].format(**self._numbers)}: it holds up training for "
            f"{_spell(interval.cost_s)} and is durable after {durable}, a step takes "
            f"{_spell(self._step_s)}."
        )

    def news(self) -> str:
        chosen_s, told_s = self._interval.seconds, self._told_s
        if not self._interval.is_settled or told_s / _NEWS < chosen_s < told_s * _NEWS:
            return ""
        self._told_s = chosen_s
        return self.text


def check_auto(every: object, max_overhead: object, mtbf_s: object) -> None:
    """Raises `ValueError` if what goes with `"auto"` is invalid, or there without it."""
    _check_share(every, "max_overhead", max_overhead, 1.0, "share of the time, at most 1")
    if mtbf_s is not None:
        _check_share(every, "mtbf_s", mtbf_s, math.inf, "number of seconds, or None if not known")


def _check_share(every: object, name: str, value: Any, most: float, expected: str) -> None:
    received = f"Invalid value for argument `{name}`. Received: {name}={value!r}. "
    if every != "auto" and value != MAX_OVERHEAD:
        raise ValueError(f"{received}It goes with 'auto' only, not with {every!r}.")
    number = math.nan if value is True or not isinstance(value, numbers.Real) else float(value)
    if not 0 < number <= most or math.isinf(number):
        raise ValueError(f"{received}Expected a positive {expected}.")


def _spell(seconds: float) -> str:
    """A time for a text."""
    for unit, size_s in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size_s:
            return f"{seconds / size_s:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"
