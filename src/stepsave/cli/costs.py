"""What saving every so many steps costs, from what one save costs."""

from __future__ import annotations

import dataclasses
import math

__all__ = ("SaveCost",)


@dataclasses.dataclass(frozen=True, slots=True)
class SaveCost:
    """One save.

    Attributes:
        stall_s: How long training waits for it.
        durable_s: How long from its beginning until it is committed.
        step_s: How long a step of the training takes.
    """

    stall_s: float
    durable_s: float
    step_s: float

    @property
    def write_s(self) -> float:
        """How long it keeps the disk busy."""
        return max(0.0, self.durable_s - self.stall_s)

    def overhead(self, every: int) -> float:
        """By which share a training is longer that saves every so many steps.

        The next save is captured while the last one is written; the one after it has to wait.
        """
        work_s = every * self.step_s
        return max(work_s + self.stall_s, self.write_s) / work_s - 1

    def most_lost_s(self, every: int) -> float:
        """How much of the training's time a kill undoes at most: right before a commit."""
        work_s = every * self.step_s
        return max(work_s + self.stall_s, self.write_s) + self.durable_s

    def disk_follows_every(self) -> int:
        """How many steps the disk needs for a save."""
        return max(1, math.ceil(self.write_s / self.step_s))

    def within(self, max_overhead: float) -> int:
        """How often to save: as often as a share of the time allows, and the disk follows."""
        by_waiting = math.ceil(self.stall_s / (max_overhead * self.step_s))
        return max(by_waiting, self.disk_follows_every())
