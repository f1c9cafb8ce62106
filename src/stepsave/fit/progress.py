"""How far a training is, counted in batches."""

from __future__ import annotations

import collections
import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from stepsave.engine.agreed_frequency import AgreedFrequency
from stepsave.engine.arguments import parse_time_s
from stepsave.engine.checkpointer import Checkpointer
from stepsave.engine.frequency import SaveFrequency
from stepsave.engine.peers import Board, find_peers
from stepsave.engine.step_times import StepTimes

__all__ = ("Progress", "check_save_freq", "steps_of")


_ENDED = 1000  # batches that are looked at for the last one

_EXPECTED = (
    "Expected 'epoch' or a positive integer (batches); a time such as '30s', '5min' or '1.5h'; or "
    "'auto'."
)


def check_save_freq(save_freq: object, *, may_be_false: bool) -> str | int:
    """Returns how often to save: `"epoch"`, a number of batches, a time, `"auto"`, or `False`.

    Raises:
        ValueError: If it is something else.
    """
    received = f"Invalid value for argument `save_freq`. Received: save_freq={save_freq}. "
    if save_freq is False:
        if may_be_false:
            return False
        raise ValueError(
            f"{received}`False` (no periodic saves) makes sense only with "
            f"`save_before_preemption=True`. {_EXPECTED}"
        )
    if isinstance(save_freq, str) and (save_freq in ("epoch", "auto") or parse_time_s(save_freq)):
        return save_freq
    if isinstance(save_freq, numbers.Integral) and save_freq is not True and int(save_freq) >= 1:
        return int(save_freq)
    raise ValueError(f"{received}{_EXPECTED}")


def steps_of(params: Mapping[str, Any] | None) -> int | None:
    """Batches of an epoch, if known, by what Keras tells its callbacks."""
    steps = (params or {}).get("steps")
    return int(steps) if isinstance(steps, numbers.Integral) else None


class Progress:
    """Counts batches exactly, across epochs and however many `fit` does at once.

    Attributes:
        save_freq: A save is due each time so many batches are done; None if not by their number.
        frequency: Says when a save is due otherwise.
        epoch: Epoch in progress, from 0.
        batches_done: Batches done in it.
        steps: Batches of an epoch, if known.
        global_step: Batches trained since the beginning.
        save_is_due: Whether a save became due since the last one.
        times: How long what `fit` does at once takes: a batch, or `steps_per_execution` of them.
    """

    __slots__ = (
        "_begun",
        "_ended",
        "_timed",
        "batches_done",
        "epoch",
        "frequency",
        "global_step",
        "save_freq",
        "save_is_due",
        "steps",
        "times",
    )

    def __init__(self, save_freq: str | int, max_overhead: float, mtbf_s: float | None) -> None:
        """Counts from 0, and has no clock yet.

        Args:
            save_freq: What `check_save_freq` has returned.
            max_overhead: See `SaveFrequency`.
            mtbf_s: The same.
        """
        every = save_freq if isinstance(save_freq, str) and save_freq != "epoch" else None
        self._timed = every, max_overhead, mtbf_s
        self.save_freq = save_freq if type(save_freq) is int else None
        self.frequency: SaveFrequency = SaveFrequency()
        self.epoch = 0
        self.batches_done = 0
        self.steps: int | None = None
        self.global_step = 0
        self.save_is_due = False
        self._begun = 0
        # As told, perhaps from several of Keras's dispatch threads, which come in any order.
        self._ended: collections.deque[int] = collections.deque([0], maxlen=_ENDED)
        self.times = StepTimes()

    def begin_fit(self, saver: Checkpointer, computed: Callable[[Checkpointer], object]) -> None:
        """Takes note that training begins, by which time saves may be due.

        Args:
            saver: Who saves.
            computed: Returns when the steps so far have been computed.
        """
        every, max_overhead, mtbf_s = self._timed
        if every is None:
            return
        wait = functools.partial(computed, saver)
        frequency = SaveFrequency.of(every, max_overhead=max_overhead, mtbf_s=mtbf_s, wait=wait)
        peers = find_peers()
        if peers is not None:
            board = Board(peers, f"frequency of {saver.directory}")
            frequency = AgreedFrequency(frequency, board, self.global_step, wait)
        self.frequency = frequency

    def begin_epoch(self, epoch: int, steps: int | None) -> None:
        self.epoch = epoch
        self.steps = steps
        self.batches_done = self._begun = 0
        self._ended = collections.deque([0], maxlen=_ENDED)
        self.times.begin(at_once=True)

    def begin_batch(self, batch: int) -> None:
        """Takes note that a batch of this epoch, counted from 0, begins."""
        self._begun = batch

    def end_batch(self, batch: int) -> None:
        """Takes note that it has ended. From any thread."""
        self._ended.append(batch + 1)  # one step, and no lock: see `stepsave.threads`

    @property
    def told_ended(self) -> int:
        """How many batches of this epoch have ended, as far as was told."""
        return max(self._ended)

    def certainly_ended(self, model: Any) -> int:
        """How many have ended for certain: dispatch threads may not have told of the last yet."""
        return max(*self._ended, self._begun + 1 if model.steps_per_execution == 1 else 0)

    def go_on_at(self, batch: int) -> None:
        """Takes note that the epoch goes on after batches that are counted already."""
        self.batches_done = batch
        # On the way there batches may be passed over: no step.
        self.times.begin(at_once=batch == 0)

    def advance(self, batches_done: int, *, timed: bool = True) -> None:
        """Takes note that so many batches of this epoch are done, if `timed` just now."""
        if self.steps is not None and batches_done > self.steps:
            # With several steps per execution Keras numbers the last one as if it were full.
            batches_done = self.steps
        passed = batches_done - self.batches_done
        if passed <= 0:
            return
        if timed:
            self.times.note()
        before = self.global_step
        self.batches_done = batches_done
        self.global_step += passed
        if self.save_freq is not None:
            # Due when a multiple is passed, so that the count stays exact where several
            # batches are passed at once.
            self.save_is_due |= self.global_step // self.save_freq > before // self.save_freq
        else:
            self.save_is_due |= self.frequency.is_due(self.global_step)
