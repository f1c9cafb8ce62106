"""Steps are timed at the cost of one reading of the clock each."""

import sys
import time

import numpy as np
import pytest

from stepsave.engine import step_times
from stepsave.engine.step_times import RECENT_STEPS, StepTimes


class Clock:
    """Stands in for the module `time`: it is moved by hand, and counts how often it is read."""

    def __init__(self):
        self.now_s = 100.0
        self.reads = 0

    def perf_counter(self):
        self.reads += 1
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(step_times, "time", clock)
    return clock


def run(times, clock, durations_s):
    for duration_s in durations_s:
        clock.now_s += duration_s
        times.note()


def test_each_step_is_as_long_as_from_the_end_of_the_one_before(clock):
    times = StepTimes()
    assert times.summary() is None
    times.begin(at_once=True)
    run(times, clock, [0.5, 0.25, 4.0])
    clock.now_s += 1000  # a validation, say
    times.begin(at_once=True)
    run(times, clock, [0.25])
    found = times.summary()
    assert found.took_s == (0.5, 0.25, 4.0, 0.25)
    assert found.ended_s == (100.5, 100.75, 104.75, 1105.0)
    assert (found.count, found.total_s, found.max_s) == (4, 5.0, 4.0)
    assert (found.p50_s, found.p99_s) == (0.25, 4.0)
    assert times.summary() == found  # asking changes nothing


def test_where_the_beginning_is_not_known_the_first_step_is_not_timed(clock):
    times = StepTimes()
    times.begin(at_once=False)
    clock.now_s += 50  # passing over data
    times.note()
    run(times, clock, [1.0])
    assert times.summary().took_s == (1.0,)


def test_each_step_reads_the_clock_once_and_nothing_else(clock):
    times = StepTimes()
    times.begin(at_once=True)
    before = clock.reads
    run(times, clock, [0.01] * 3000)
    assert clock.reads - before == 3000


def test_a_million_steps_take_bounded_memory_and_are_all_counted(clock):
    rng = np.random.default_rng(0)
    durations_s = rng.lognormal(-4, 0.5, 200_000)
    times = StepTimes()
    times.begin(at_once=True)
    run(times, clock, durations_s[: 4 * RECENT_STEPS])
    held = sys.getallocatedblocks()
    run(times, clock, durations_s[4 * RECENT_STEPS :])
    assert sys.getallocatedblocks() - held < 3 * step_times._PIECE
    found = times.summary()
    assert found.count == len(durations_s)
    assert len(found.took_s) == len(found.ended_s) == RECENT_STEPS
    assert found.took_s == pytest.approx(tuple(durations_s[-RECENT_STEPS:]), abs=1e-9)
    assert found.total_s == pytest.approx(durations_s.sum())
    assert found.max_s == pytest.approx(durations_s.max())
    assert found.p50_s == pytest.approx(np.quantile(durations_s, 0.5), rel=0.012)
    assert found.p99_s == pytest.approx(np.quantile(durations_s, 0.99), rel=0.012)


@pytest.mark.parametrize("duration_s", [0.0, 1e-9, 1e6])
def test_steps_of_any_length_have_a_class(clock, duration_s):
    times = StepTimes()
    times.begin(at_once=True)
    run(times, clock, [duration_s] * (RECENT_STEPS + 1))
    found = times.summary()
    assert found.count == RECENT_STEPS + 1
    assert 0 <= found.p50_s <= found.max_s


def test_it_times_by_the_clock_that_saves_are_timed_by():
    times = StepTimes()
    before_s = time.perf_counter()
    times.begin(at_once=True)
    times.note()
    assert before_s <= times.summary().ended_s[0] <= time.perf_counter()
