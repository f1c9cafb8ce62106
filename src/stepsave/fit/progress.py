"""How far a training is, counted in batches."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

__all__ = ("Progress", "check_save_freq", "steps_of")


def check_save_freq(save_freq: object, *, may_be_false: bool) -> str | int:
    """Returns how often to save: `"epoch"`, a number of batches, or `False` for never.

    Raises:
        ValueError: If it is something else.
    """
    received = f"Invalid value for argument `save_freq`. Received: save_freq={save_freq}. "
    if save_freq is False:
        if may_be_false:
            return False
        raise ValueError(
            f"{received}`False` (no periodic saves) makes sense only with "
            "`save_before_preemption=True`. Expected 'epoch' or a positive integer."
        )
    if save_freq == "epoch":
        return "epoch"
    if isinstance(save_freq, numbers.Integral) and save_freq is not True and int(save_freq) >= 1:
        return int(save_freq)
    raise ValueError(f"{received}Expected 'epoch' or a positive integer.")


def steps_of(params: Mapping[str, Any] | None) -> int | None:
    """Batches of an epoch, if known, by what Keras tells its callbacks."""
    steps = (params or {}).get("steps")
    return int(steps) if isinstance(steps, numbers.Integral) else None


class Progress:
    """Counts batches exactly, across epochs and however many `fit` does at once.

    Attributes:
        save_freq: A save is due each time so many batches are done; None if only epochs
            count.
        epoch: Epoch in progress, from 0.
        batches_done: Batches done in it.
        steps: Batches of an epoch, if known.
        global_step: Batches trained since the beginning.
        save_is_due: Whether a multiple of `save_freq` was passed since the last save.
    """

    __slots__ = ("batches_done", "epoch", "global_step", "save_freq", "save_is_due", "steps")

    def __init__(self, save_freq: int | None) -> None:
        self.save_freq = save_freq
        self.epoch = 0
        self.batches_done = 0
        self.steps: int | None = None
        self.global_step = 0
        self.save_is_due = False

    def begin_epoch(self, epoch: int, steps: int | None) -> None:
        self.epoch = epoch
        self.steps = steps
        self.batches_done = 0

    def go_on_at(self, batch: int) -> None:
        """Takes note that the epoch goes on after batches that are counted already."""
        self.batches_done = batch

    def advance(self, batches_done: int) -> None:
        """Takes note that so many batches of this epoch are done."""
        if self.steps is not None and batches_done > self.steps:
            # With several steps per execution Keras numbers the last one as if it were full.
            batches_done = self.steps
        passed = batches_done - self.batches_done
        if passed <= 0:
            return
        before = self.global_step
        self.batches_done = batches_done
        self.global_step += passed
        if self.save_freq is not None:
            # Due when a multiple is passed, so that the count stays exact where several
            # batches are passed at once.
            self.save_is_due |= self.global_step // self.save_freq > before // self.save_freq
