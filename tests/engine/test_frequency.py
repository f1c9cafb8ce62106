"""When to save, in trainings that are simulated: nothing here looks at a real clock."""

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stepsave
from stepsave.engine.arguments import parse_time_s
from stepsave.engine.interval import best_interval_s
from stepsave.engine.saves import SaveHandle

pytestmark = pytest.mark.once

DISPATCH_S = 0.001  # what a step takes the host, which may be far ahead of the device


@dataclasses.dataclass
class Training:
    """A training on a device, the host that drives it, and a disk. Functions are of the number of
    the step, or of the save, from 0."""

    step_s: Callable[[int], float] = lambda _: 0.05
    stall_s: Callable[[int], float] = lambda _: 0.02
    durable_s: Callable[[int], float] = lambda _: 0.1
    compile_s: float = 20.0
    epoch: int = 500
    validation_s: float = 0.0
    runs_ahead: bool = False
    tells_of_validation: bool = True

    def __post_init__(self):
        self.now_s = self.device_s = 0.0
        self.saves = []  # step, and when it began
        self.spent_s = []
        self.validated_s = 0.0
        self.collisions = 0  # with a save before that was not durable yet
        self.news = []
        self.validated_at_s = []
        self._flying = []

    def clock(self):
        return self.now_s

    def wait(self):
        self.now_s = max(self.now_s, self.device_s)

    def frequency(self, every="auto", **options):
        return stepsave.SaveFrequency.of(every, wait=self.wait, clock=self.clock, **options)

    def run(self, frequency, steps):
        for step in range(1, steps + 1):
            self._train(step)
            self._flying = [flight for flight in self._flying if not self._land(*flight)]
            if frequency.is_due(step):
                self._save(frequency, step)
            if step % self.epoch == 0 and self.validation_s:
                self._validate(frequency)
        return self

    def _train(self, step):
        self.now_s += self.compile_s if step == 1 else DISPATCH_S
        self.device_s = max(self.device_s, self.now_s) + self.step_s(step)
        if not self.runs_ahead:
            self.wait()

    def _land(self, handle, began_s, durable_s):
        if self.now_s < began_s + durable_s:
            return False
        handle.end(durable_s, None)
        return True

    def _save(self, frequency, step):
        number = len(self.saves)
        called_s = self.now_s
        self.wait()
        self.collisions += len(self._flying)
        self.saves.append((step, self.now_s))
        self._flying.append(
            (handle := SaveHandle(step, self.now_s), self.now_s, self.durable_s(number))
        )
        self.now_s += self.stall_s(number)
        self.device_s = self.now_s
        self.spent_s.append(self.stall_s(number))
        handle.stall_s = self.now_s - called_s  # the wait for the device is in it
        frequency.note(handle)
        if text := frequency.news():
            self.news.append(text)

    def _validate(self, frequency):
        self.wait()
        if self.tells_of_validation:
            frequency.pause()
        self.now_s += self.validation_s
        self.device_s = self.now_s
        self.validated_at_s.append((self.now_s - self.validation_s, self.now_s))
        if self.tells_of_validation:
            frequency.go_on()

    def gaps(self, first=0):
        steps = [step for step, _ in self.saves[first:]]
        return [after - before for before, after in itertools.pairwise(steps)]

    def share(self, first):
        """Which share of the time of training saves have cost, from the n-th save on."""
        begin_s = self.saves[first][1]
        end_s = self.saves[-1][1]
        paused_s = sum(b - a for a, b in self.validated_at_s if begin_s <= a < end_s)
        if not self.tells_of_validation:
            paused_s = 0.0
        return sum(self.spent_s[first:-1]) / (end_s - begin_s - paused_s)


def noisy(value, spread, seed):
    noise = random.Random(seed)
    return lambda _: value * noise.uniform(1 - spread, 1 + spread)


LEARNED = 4  # saves

TRAININGS = {
    "constant": {},
    "with noise": {
        "step_s": noisy(0.05, 0.5, 1),
        "stall_s": noisy(0.02, 0.3, 2),
        "durable_s": noisy(0.1, 0.5, 3),
    },
    "steps that grow longer": {"step_s": lambda step: 0.05 * (1 + step / 5000)},
    "steps that get quicker": {"step_s": lambda step: 0.5 / (1 + step / 2000)},
    "steps of an hour": {"step_s": lambda _: 3600.0, "stall_s": lambda _: 7.0},
    "steps of a millisecond": {
        "step_s": lambda _: 0.001,
        "stall_s": lambda _: 0.0004,
        "durable_s": lambda _: 1e-3,
    },
    "first saves whose memory comes": {"stall_s": lambda save: 0.5 if save < 2 else 0.02},
    "one save in twenty that takes ten times as long": {
        "stall_s": lambda save: 0.2 if save % 20 == 7 else 0.02
    },
    "a slow validation": {"validation_s": 300.0, "epoch": 70},
    "a slow validation that nobody tells of": {
        "validation_s": 300.0,
        "epoch": 70,
        "tells_of_validation": False,
    },
    "a host that runs ahead": {"runs_ahead": True},
    "a host that runs ahead, and validation": {
        "runs_ahead": True,
        "validation_s": 30.0,
        "epoch": 333,
    },
    "a slow compilation": {"compile_s": 1800.0},
}


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("max_overhead", [0.01, 0.1])
def test_saves_cost_what_they_may_and_not_much_less(name, max_overhead):
    training = Training(**TRAININGS[name])
    training.run(training.frequency(max_overhead=max_overhead), 15_000)
    assert training.collisions == 0
    share = training.share(LEARNED)
    assert share <= max_overhead
    if name not in ("steps of an hour", "a slow validation that nobody tells of"):
        # There a save after each step costs less; and here intervals are by a guess.
        assert share >= max_overhead / 2.2


@pytest.mark.parametrize("name", TRAININGS)
def test_the_choice_settles(name):
    training = Training(**TRAININGS[name])
    training.run(frequency := training.frequency(), 15_000)
    assert 1 <= len(training.news) <= (4 if "first saves" in name else 2)
    assert training.news[0].count("\n") == 0
    assert "a save every" in frequency.text
    if "grow" in name or "quicker" in name or "nobody" in name:
        return  # the interval is the same, the steps in it are not
    gaps = training.gaps(2 * LEARNED)
    half = statistics.median(gaps)
    # Steps that are longer or shorter by chance, and no two choices that take turns.
    assert all(0.6 * half - 1 <= gap <= 1.7 * half + 1 for gap in gaps)


def test_the_first_save_comes_early_and_the_compilation_does_not_count():
    training = Training(compile_s=1800.0)
    training.run(training.frequency(), 2000)
    assert training.saves[0][0] == 3
    # Ten times the budget for the first two, as more is learned by them only.
    assert training.gaps()[0] == pytest.approx(0.02 / (10 * 0.01) / 0.05, abs=2)


def test_a_state_that_grows_slow_on_the_disk_is_saved_less_often():
    training = Training(durable_s=lambda save: 0.1 if save < 20 else 30.0)
    training.run(training.frequency(), 15_000)
    assert training.collisions == 0
    slow = training.gaps(32)
    assert 30 / 0.051 <= min(slow) <= max(slow) <= 2 * 30 / 0.05
    assert "take so long to be durable" in training.news[-1]
    assert len(training.news) <= 6


def test_a_save_is_not_begun_before_the_last_one_is_durable_whatever_was_learned():
    # Each tenth takes a hundred times as long as the others: no median says so.
    training = Training(
        durable_s=lambda save: 100.0 if save % 10 == 9 else 0.1, stall_s=lambda _: 1e-3
    )
    training.run(training.frequency(), 15_000)
    assert training.collisions == 0
    assert len(training.saves) > 50


def test_saves_that_become_expensive_are_made_less_often():
    training = Training(stall_s=lambda save: 0.02 if save < 100 else 0.5)
    training.run(training.frequency(), 30_000)
    assert training.share(115) <= 0.01
    assert statistics.median(training.gaps(115)) >= 0.5 / 0.01 / 0.051


@pytest.mark.parametrize("stall_s", [0.02, 0.5])
def test_with_failures_saves_are_as_often_as_loses_least(stall_s):
    mtbf_s = 20_000.0
    training = Training(stall_s=lambda _: stall_s)
    training.run(training.frequency(mtbf_s=mtbf_s, max_overhead=0.05), 30_000)
    best_s = best_interval_s(stall_s, mtbf_s)
    took_s = statistics.median(training.gaps(LEARNED)) * 0.05 + stall_s
    assert took_s == pytest.approx(best_s, rel=0.05)
    assert "Young/Daly" in training.news[-1]


def test_the_budget_wins_over_failures():
    training = Training(stall_s=lambda _: 0.5)
    training.run(training.frequency(mtbf_s=60.0), 30_000)
    assert training.share(LEARNED) <= 0.01
    assert "max_overhead=0.01" in training.news[-1]


def test_a_training_that_runs_ahead_saves_as_often_as_one_that_does_not():
    numbers = []
    for runs_ahead in (False, True):
        training = Training(runs_ahead=runs_ahead, step_s=lambda _: 0.05, epoch=10**9)
        training.run(training.frequency(), 20_000)
        numbers.append(len(training.saves))
    assert numbers[1] == pytest.approx(numbers[0], rel=0.1)


def test_a_skipped_or_failed_save_teaches_nothing():
    training = Training()
    frequency = training.frequency()
    training.run(frequency, 5000)
    text = frequency.text
    for skips in (True, False):
        handle = SaveHandle(10_000, 0.0)
        handle.stall_s = 1000.0 if skips else 0.02
        if skips:
            handle.skip()
        else:
            handle.end(None, RuntimeError("the disk is full"))
        frequency.note(handle)
        assert not frequency.is_due(10_001)
    assert frequency.text == text


@settings(max_examples=60)
@given(
    step_s=st.floats(1e-3, 100),
    stall_s=st.floats(1e-4, 10),
    durable_s=st.floats(1e-3, 100),
    overhead=st.sampled_from([0.001, 0.01, 0.05, 0.5, 1.0]),
    validation_s=st.sampled_from([0.0, 1.0, 1000.0]),
    runs_ahead=st.booleans(),
    seed=st.integers(0, 9),
)
def test_whatever_the_training_is_like_saves_cost_what_they_may_and_never_meet(
    step_s, stall_s, durable_s, overhead, validation_s, runs_ahead, seed
):
    training = Training(
        step_s=noisy(step_s, 0.3, seed),
        stall_s=lambda save: stall_s * (10 if save < 2 else 1),
        durable_s=noisy(durable_s, 0.3, seed + 100),
        validation_s=validation_s,
        runs_ahead=runs_ahead,
    )
    training.run(training.frequency(max_overhead=overhead), 5000)
    assert training.collisions == 0
    assert training.saves
    if len(training.saves) > LEARNED + 2:
        assert training.share(LEARNED) <= overhead * 1.05


# By time.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5min", 300), ("1.5h", 5400), ("0.5 s", 0.5), ("0s", 0)],
)
def test_times_are_read(text, seconds):
    assert parse_time_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "-5s", "5", "5m", "5 minutes", "1e3s", "nans", "infs", ".5s", "5s ", "٣s", 5]
)
def test_what_is_no_time_is_not_read(text):
    assert parse_time_s(text) is None


@pytest.mark.parametrize("validation_s", [0.0, 45.0])
def test_a_save_is_due_at_the_first_cut_at_which_the_time_has_passed(validation_s):
    training = Training(step_s=lambda _: 0.7, validation_s=validation_s, epoch=50)
    begun_s = training.now_s
    training.run(training.frequency("30s"), 2000)
    cuts = [begun_s] + [began_s for _, began_s in training.saves]
    apart_s = [after - before for before, after in itertools.pairwise(cuts)]
    assert min(apart_s) >= 30
    # The step at whose end it is seen, and the validation that may lie before it.
    longest_s = 30 + 0.71 + validation_s
    assert max(apart_s) <= longest_s
    assert statistics.median(apart_s) <= 30 + 0.71 + validation_s / 2
    assert len(training.saves) >= training.now_s / (longest_s + 0.02) - 1


def test_the_first_save_by_time_counts_from_the_begin_of_the_training():
    training = Training(compile_s=31.0)
    training.run(training.frequency("30s"), 20)
    assert [step for step, _ in training.saves] == [1]


def test_by_time_a_training_that_runs_ahead_is_waited_for_now_and_then():
    training = Training(runs_ahead=True, epoch=10**9, compile_s=1.0)
    training.run(training.frequency("30s"), 20_000)
    times_s = [began_s for _, began_s in training.saves]
    apart_s = np.diff(times_s)
    # An epoch is dispatched in a second here: its clock would say that nothing is due.
    assert min(apart_s) >= 30
    assert max(apart_s) <= 31
    assert len(times_s) >= 20_000 * 0.05 / 31 - 1


def test_between_two_looks_at_the_clock_a_training_that_runs_ahead_is_not_held_up():
    training = Training(runs_ahead=True, epoch=10**9)
    waits = []
    frequency = stepsave.SaveFrequency.of(
        "5min", wait=lambda: waits.append(training.wait()), clock=training.clock
    )
    training.run(frequency, 20_000)
    assert len(waits) <= 12 * len(training.saves)


@pytest.mark.parametrize("every", ["30s", "auto"])
def test_a_save_that_is_made_for_another_reason_counts_too(every):
    training = Training()
    training.run(frequency := training.frequency(every), 3000)
    last = SaveHandle(3000, 0.0)
    last.end(0.1, None)
    assert not frequency.is_due(3000)
    training.now_s += 1000.0
    frequency.note(last)
    assert not frequency.is_due(3001)
    training.now_s += 29.0
    assert not frequency.is_due(3002)
    training.now_s += 2.0
    assert frequency.is_due(3003) == (every == "30s")


def test_without_a_choice_there_is_nothing_to_tell():
    training = Training()
    training.run(frequency := training.frequency("30s"), 2000)
    assert not training.news
    assert frequency.text == ""


# What is wrong with arguments, says so.


@pytest.mark.parametrize("every", ["epoch", "0s", "30", "", None, 5, True])
def test_an_invalid_frequency_is_refused(every):
    with pytest.raises(ValueError, match=r"`every`. Received: every=.*'5min'.*'auto'"):
        stepsave.SaveFrequency.of(every)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan, math.inf, True, False, "0.01", None])
def test_an_invalid_budget_is_refused(share):
    with pytest.raises(ValueError, match=rf"`max_overhead`. Received: max_overhead={share!r}.*at"):
        stepsave.SaveFrequency.of("auto", max_overhead=share)


@pytest.mark.parametrize("mtbf_s", [0, -1, math.nan, math.inf, True, "1h"])
def test_an_invalid_time_between_failures_is_refused(mtbf_s):
    with pytest.raises(ValueError, match=rf"`mtbf_s`. Received: mtbf_s={mtbf_s!r}.*seconds"):
        stepsave.SaveFrequency.of("auto", mtbf_s=mtbf_s)


@pytest.mark.parametrize("options", [{"mtbf_s": 3600}, {"max_overhead": 0.05}])
def test_what_goes_with_auto_is_refused_without_it(options):
    with pytest.raises(ValueError, match="goes with 'auto' only, not with '30s'"):
        stepsave.SaveFrequency.of("30s", **options)


@pytest.mark.parametrize("share", [1, 0.5, np.float32(0.25), 1e-9])
def test_a_valid_budget_is_taken(share):
    assert stepsave.SaveFrequency.of("auto", max_overhead=share).is_due(1) is False


def test_a_loop_of_ones_own_saves_and_restores_by_it(tmp_path):
    now_s = 0.0
    frequency = stepsave.SaveFrequency.of("10s", clock=lambda: now_s)
    weights = np.zeros(1000)
    saved = []
    with stepsave.Checkpointer(tmp_path) as saver:
        for step in range(1, 36):
            weights += 1.0
            now_s += 1.5
            if frequency.is_due(step):
                saved.append(step)
                frequency.note(saver.save(step, {"weights": weights}))
    assert saved == [7, 14, 21, 28, 35]
    found = stepsave.restore(tmp_path)
    assert found.step == 35
    assert found.state["weights"].tobytes() == np.full(1000, 35.0).tobytes()
