"""What share of its time does a training lose to failures, by how often it saves?

A simulation, from measured inputs: what a save holds up, when it is durable, how long a resume
takes. Failures come at random, as often as others have counted on thousands of accelerators. With
each, what was done since the last durable save is lost, and everything has to start again.

The rate is that of Llama 3's training: 419 unexpected interruptions in 54 days on 16,384 GPUs
(Grattafiori et al., *The Llama 3 Herd of Models*, 2024, section 3.3.4, table 5). The interval that
loses least is near sqrt(2 x what a save costs x the mean time between failures): Young (1974),
Daly (2006).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = (
    "ACCELERATORS",
    "Inputs",
    "best_interval_s",
    "mean_time_between_failures_s",
    "share_lost",
)

ACCELERATORS = (16, 1024, 16_384)
_FAILURES, _DAYS, _COUNTED_ON = 419, 54, 16_384
_LIVES = 20_000  # from one failure to the next


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """What a system's saves and resumes take, in seconds.

    Attributes:
        stall_s: What a save holds up training.
        durable_s: From the begin of a save until nothing can undo it.
        resume_s: From the failure until training goes on.
    """

    stall_s: float
    durable_s: float
    resume_s: float


def mean_time_between_failures_s(accelerators: int) -> float:
    """How long so many run on average until one fails, and all with it."""
    return _DAYS * 86_400 * _COUNTED_ON / _FAILURES / accelerators


def best_interval_s(inputs: Inputs, failing_s: float) -> float:
    """Young's interval; but no more often than saves can be made durable."""
    return max(math.sqrt(2 * inputs.stall_s * failing_s), inputs.durable_s)


def share_lost(inputs: Inputs, interval_s: float, failing_s: float, seed: int = 0) -> float:
    """Returns which share of the time does not end up in the model.

    Args:
        inputs: Of the system.
        interval_s: Time of training between two saves.
        failing_s: Mean time between failures.
        seed: Of the random numbers.
    """
    lives_s = np.random.default_rng(seed).exponential(failing_s, _LIVES)
    # Two buffers: a save that is not durable yet holds up the next but one.
    cycle_s = max(interval_s + inputs.stall_s, inputs.durable_s)
    late_s = inputs.durable_s - inputs.stall_s  # behind the end of its cycle
    durable = np.floor((lives_s - inputs.resume_s - late_s) / cycle_s)
    kept_s = np.maximum(durable, 0) * interval_s
    return float(1 - kept_s.sum() / lives_s.sum())
