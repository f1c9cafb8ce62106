"""Several processes that end at the same step, whichever of them is told to.

One that stopped earlier than the others would have them wait in vain: a step needs all. And none
may wait for the others between two steps, as they may need it for theirs. So a thread of each does
the talking. Process 0 proposes a step that is a few seconds ahead, and each says which one it has
seen end. If all are before it, it is agreed; else a later one is proposed. Who comes to the
proposed step waits for the answer, which nobody can hold up who trains.
"""

from __future__ import annotations

import itertools
import math
import threading
import time

from stepsave.engine.peers import Board
from stepsave.errors import PeerError
from stepsave.threads import Crew, Latch

__all__ = ("StopAgreement",)

_POLL_S = 1.0  # process 0 answers all of them
_AHEAD_S = 3.0
"""How far ahead a step is proposed: until all have heard of it."""

_LIMIT_S = 120.0


class StopAgreement:
    """The step at which all processes of a training end. `is_due` is for the thread of `fit`."""

    def __init__(self, board: Board) -> None:
        """Begins to listen, in a thread of its own.

        Args:
            board: Where processes tell each other.
        """
        self._board = board
        self._wish: int | None = None
        self._proposed: tuple[int, Latch] | None = None
        self._agreed: int | None = None
        self._steps_seen: tuple[tuple[int, float], int] | None = None
        self._is_over = False
        self._error: Exception | None = None
        self.signum: int | None = None
        self._crew = Crew(1, "stepsave-stop")
        self._crew.put(self._talk)

    def is_due(self, step: int, signum: int | None) -> bool:
        """Whether all processes end at this step.

        Args:
            step: How many steps have been made.
            signum: The signal that this process has got, if it has.

        Raises:
            PeerError: If another process does not answer.
        """
        first = (step, time.monotonic()) if self._steps_seen is None else self._steps_seen[0]
        # Before the proposal is looked at, which is made before this is: one sees the other.
        self._steps_seen = first, step
        if signum is not None:
            self._wish = signum
        proposed = self._proposed
        if proposed is not None and step >= proposed[0]:
            proposed[1].wait(_LIMIT_S)
        if self._error is not None:
            raise self._error
        return self._agreed is not None and step >= self._agreed

    def end(self) -> None:
        """Returns when process 0 has saved, which it says by this.

        Raises:
            PeerError: If it does not.
        """
        if self._board.peers.is_leader:
            self._board.say("saved")
        else:
            self._board.hear("saved")

    def close(self) -> None:
        """Listens no more."""
        self._is_over = True
        self._crew.end()

    @property
    def _step(self) -> int:
        return -1 if self._steps_seen is None else self._steps_seen[1]

    def _ahead(self) -> int:
        """How many steps are made meanwhile, at the pace so far."""
        if self._steps_seen is None:
            return 2
        (first, since_s), step = self._steps_seen
        took_s = max(time.monotonic() - since_s, 1e-3)
        return 2 + math.ceil((step - first) / took_s * _AHEAD_S)

    def _goes_on(self) -> bool:
        return not self._is_over and threading.main_thread().is_alive()

    def _talk(self) -> None:
        try:
            self._listen()
        except Exception as e:  # noqa: BLE001  raised by `is_due`
            self._error = e
            if self._proposed is not None:
                self._proposed[1].open()

    def _listen(self) -> None:
        board, round_ = self._board, 0
        is_told = False
        while self._goes_on():
            if self._wish is not None and not is_told:
                self._tell(self._wish)
                is_told = True
            if board.peers.is_leader:
                wish = board.peek("wish")
                if wish is not None:
                    self._lead(wish["signum"])
                    return
            elif (proposal := board.peek(f"stop {round_}")) is not None:
                if self._answer(round_, proposal):
                    return
                round_ += 1
                continue
            time.sleep(_POLL_S)

    def _tell(self, signum: int) -> None:
        """Says that a process was told to stop, whichever is the first to say so."""
        if self._board.peek("wish") is None:
            try:
                self._board.say("wish", signum=signum)
            except PeerError:
                if self._board.peek("wish") is None:  # else another one was faster
                    raise

    def _lead(self, signum: int) -> None:
        """Proposes steps until one is agreed."""
        board = self._board
        for round_ in itertools.count():
            if not self._goes_on():
                return
            proposal = {"step": self._step + self._ahead() * 2**round_, "signum": signum}
            board.say(f"stop {round_}", **proposal)
            latch = self._propose(proposal)
            seen = [self._step]
            seen += [
                board.hear(f"seen {round_} {rank}", _LIMIT_S, who=rank)["step"]
                for rank in range(1, board.peers.count)
            ]
            is_agreed = max(seen) < proposal["step"]
            board.say(f"agreed {round_}", agreed=is_agreed)
            if self._settle(proposal, latch, is_agreed=is_agreed):
                return

    def _answer(self, round_: int, proposal: dict[str, int]) -> bool:
        latch = self._propose(proposal)
        self._board.say(f"seen {round_} {self._board.peers.rank}", step=self._step)
        is_agreed = self._board.hear(f"agreed {round_}", _LIMIT_S)["agreed"]
        return self._settle(proposal, latch, is_agreed=is_agreed)

    def _propose(self, proposal: dict[str, int]) -> Latch:
        latch = Latch()
        self.signum = proposal["signum"]
        self._proposed = proposal["step"], latch
        return latch

    def _settle(self, proposal: dict[str, int], latch: Latch, *, is_agreed: bool) -> bool:
        if is_agreed:
            self._agreed = proposal["step"]
        latch.open()
        return is_agreed
