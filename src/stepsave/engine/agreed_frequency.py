"""Several processes that save the same steps, as the clock of process 0 says.

None may wait for the others between two steps, as they may need it for theirs. So process 0 says
ahead of time at which step it will be known whether to save (a *point*), and at each point, to be
followed a few steps later, whether all save there, and where the next point is:

    process 0, at step 40      says: save at 44, look again at 60, and that holds for 64
    all, at step 44            save; that was heard in the meantime, or is waited for
    process 0, at step 60      says: do not save at 64, look again at 80 …

Nobody can be held up for ever: process 0 comes to a point whatever the others do at later steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from stepsave.engine.frequency import SaveFrequency
from stepsave.engine.peers import Board
from stepsave.engine.saves import SaveHandle
from stepsave.errors import PeerError
from stepsave.threads import Call, Crew

__all__ = ("AgreedFrequency",)

_AHEAD_S = 0.5
"""How much earlier than it is followed a decision is made: until all have heard of it."""

_APART_S = 2.0  # from where one is followed to the next: process 0 answers all of them
_LIMIT_S = 120.0
_KEPT = 100
"""Decisions that can still be heard. Who is further behind has had no part in steps that were made
since, and these need all."""


class AgreedFrequency(SaveFrequency):
    """What process 0 does by a frequency of its own, and the others after it."""

    def __init__(
        self,
        frequency: SaveFrequency,
        board: Board,
        step: int,
        wait: Callable[[], object],
    ) -> None:
        """Starts a thread that talks.

        Args:
            frequency: Process 0's; that of the others is not asked.
            board: Where processes tell each other.
            step: The step at which all of them begin.
            wait: Returns when the steps so far have been computed.
        """
        self._frequency = frequency
        self._board = board
        self._wait = wait
        self._number = 0
        self._point, self._follow = step, step + 1  # the first is followed at once
        self._decision: Call[dict[str, Any]] | None = None  # said, or being heard
        self._seen = step, time.monotonic()
        self._is_over = False
        self._crew = Crew(1, "stepsave-frequency")

    def is_due(self, step: int) -> bool:
        """Whether all save now.

        Raises:
            PeerError: If process 0 does not say so in time.
        """
        if step >= self._point and self._decision is None:
            self._decision = self._begin(step)
        if step < self._follow:
            return False
        assert self._decision is not None
        if not self._decision.done.wait(_LIMIT_S):
            raise self._late()
        told = self._decision.take()
        self._number, self._decision = self._number + 1, None
        self._point, self._follow = told["point"], told["follow"]
        if told["save"]:
            self.settle()
        return told["save"]

    def _begin(self, step: int) -> Call[dict[str, Any]]:
        number, board = self._number, self._board
        if not board.peers.is_leader:
            return self._crew.begin(lambda: self._hear(number))
        step_s = self._measure(step)
        point = max(step, self._follow) + math.ceil(_APART_S / step_s)
        follow = point + math.ceil(_AHEAD_S / step_s)
        told = {"save": self._frequency.is_due(step), "point": point, "follow": follow}

        def say() -> dict[str, Any]:
            board.say(f"decision {number}", **told)
            if number >= _KEPT:
                board.forget(f"decision {number - _KEPT}")
            return told

        return self._crew.begin(say)

    def _measure(self, step: int) -> float:
        """How long a step has taken since the last point."""
        self._wait()
        (before, before_s), self._seen = self._seen, (step, time.monotonic())
        return max(self._seen[1] - before_s, 1e-3) / (step - before)

    def _hear(self, number: int) -> dict[str, Any]:
        told = self._board.watch(f"decision {number}", _LIMIT_S, self._has_ended)
        if told is None:
            raise self._late()
        return told

    def _late(self) -> PeerError:
        what = f"has waited {_LIMIT_S:.0f} s to hear from process 0 when to save"
        return PeerError(self._board.text(f"{what}. Look whether that has ended"))

    def _has_ended(self) -> bool:
        return self._is_over or not threading.main_thread().is_alive()

    def settle(self) -> None:
        self._frequency.settle()

    def note(self, handle: SaveHandle) -> None:
        self._frequency.note(handle)

    def pause(self) -> None:
        self._frequency.pause()

    def go_on(self) -> None:
        self._frequency.go_on()

    def close(self) -> None:
        self._is_over = True
        self._crew.end()

    @property
    def text(self) -> str:
        return self._frequency.text if self._board.peers.is_leader else ""

    def news(self) -> str:
        return self._frequency.news() if self._board.peers.is_leader else ""
