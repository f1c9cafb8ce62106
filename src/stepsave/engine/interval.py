"""How often to save, from what saves cost: arithmetic, and no clock.

not more often than    cost / max_overhead    what the user wants to pay
durable                the disk: no save waits for the one before
as often as            Young/Daly             what failures make worth paying, if known
"""

from __future__ import annotations

import collections
import math
import statistics

__all__ = ("Interval", "best_interval_s")

_WARM_UP = 2
"""Saves that tell nothing of later ones: each of two buffers is used for the first time."""

_EAGERNESS = 10
"""How many times its share the first saves may cost, as they have to be made to know more."""

_WINDOW = 9  # saves that are looked back on
_SPIKE = 5  # times the median: what one save costs beyond that is taken for an accident
_MARGIN = 1.2
"""How much longer than it may be an interval is chosen, so that noise does not change it."""

_BAND = 0.8, 1.25  # around what would be chosen; within, the choice stays
_SLACK = 2.0  # times what it may be; within, a choice that is the budget's or the disk's stays
_STEP = 2.0  # a choice changes by this factor at most, per save


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Returns the time from one save to the next by which failures cost least.

    To first order sqrt(2 x cost x mtbf): J. W. Young, "A first order approximation to the optimum
    checkpoint interval", Communications of the ACM 17 (9), 1974. Here with the terms that J. T.
    Daly adds, "A higher order estimate of the optimum checkpoint interval for restart dumps",
    Future Generation Computer Systems 22 (3), 2006: 2 % where a save costs a hundredth of the mtbf.
    That a save is durable only later, and how long a restart takes, does not change the optimum.

    Args:
        cost_s: What a save holds up training.
        mtbf_s: Mean time between failures.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s + cost_s
    share = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(share) / 3 + share / 9)


class Interval:
    """The time from one save to the next; learns with each of them.

    Steady: what it goes by is averaged over some saves, a choice stays while it is good enough, and
    changes by a factor of two at most.

    Attributes:
        seconds: The choice, from the begin of a save to the begin of the next.
        bound: What decides: `"budget"`, `"disk"` or `"failures"`.
        is_settled: Whether it is by saves that are like those to come.
    """

    def __init__(self, max_overhead: float, mtbf_s: float | None) -> None:
        """Knows nothing yet.

        Args:
            max_overhead: Share of the time that saves may cost.
            mtbf_s: Mean time between failures, if known.
        """
        self._max_overhead = max_overhead
        self._mtbf_s = mtbf_s
        self._costs_s: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._durables_s: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._saves = 0
        self.seconds = 0.0
        self.bound = "budget"

    @property
    def is_settled(self) -> bool:
        return self._saves > _WARM_UP + 1

    @property
    def cost_s(self) -> float:
        """What a save holds up training: the mean of the last ones, without accidents."""
        if not self._costs_s:
            return 0.0
        most_s = _SPIKE * statistics.median(self._costs_s)
        return statistics.fmean(min(cost_s, most_s) for cost_s in self._costs_s)

    @property
    def durable_s(self) -> float:
        """How long it takes until a save is durable: the median of the last ones."""
        return statistics.median(self._durables_s) if self._durables_s else 0.0

    def learn(self, cost_s: float, durable_s: float | None) -> None:
        """Takes note of a save, and chooses anew.

        Args:
            cost_s: What it has held up training.
            durable_s: How long the save before it took to be durable, from its begin; None if
                there was none, or it failed.
        """
        self._saves += 1
        if durable_s is not None and self._saves > _WARM_UP + 1:  # not of one that warmed up
            self._durables_s.append(durable_s)
        if self._saves <= _WARM_UP:
            self.seconds = cost_s / min(1.0, self._max_overhead * _EAGERNESS)
            return
        self._costs_s.append(cost_s)
        self._choose()

    def _choose(self) -> None:
        floor_s, wish_s = self._wish()
        present_s = self.seconds
        if self._saves == _WARM_UP + 1 or present_s == 0:
            self.seconds = wish_s
            return
        least_s = max(floor_s, wish_s * _BAND[0])
        most_s = max(floor_s * _SLACK, wish_s * _BAND[1])
        if not least_s <= present_s <= most_s:
            self.seconds = min(max(wish_s, present_s / _STEP), present_s * _STEP)

    def _wish(self) -> tuple[float, float]:
        """The least that it may be, and what would be chosen now; notes what decides."""
        budget_s, disk_s = self.cost_s / self._max_overhead, self.durable_s
        floor_s = max(budget_s, disk_s)
        self.bound = "budget" if budget_s >= disk_s else "disk"
        wish_s = floor_s * _MARGIN
        if self._mtbf_s is not None:
            best_s = best_interval_s(self.cost_s, self._mtbf_s)
            if best_s > wish_s:
                self.bound, wish_s = "failures", best_s
        return floor_s, wish_s
