"""`save_freq` as a time and as "auto", in real fits whose clock the tests hold."""
# ruff: noqa: ARG002  callbacks have Keras's signatures

import functools
import itertools

import keras
import pytest
from exact_support import EPOCHS, Interrupt, StopError, train
from keras_support import (
    STEPS,
    InterruptionError,
    X,
    Y,
    fit,
    fit_interrupted,
    leave,
    several_steps_per_call,
    small_model,
)
from rows import STEPS as EXACT_STEPS

import stepsave
from stepsave import BackupAndRestore
from stepsave.engine import frequency
from stepsave.engine.checkpointer import Checkpointer


class Clock(keras.callbacks.Callback):
    """A clock that goes on by a second with each batch, and by `validation_s` with a validation."""

    def __init__(self, validation_s=0.0, step_s=1.0):
        super().__init__()
        self.now_s = 0.0
        self.step_s, self.validation_s = step_s, validation_s
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return self.now_s

    def on_train_batch_begin(self, batch, logs=None):
        self.now_s += self.step_s

    def on_test_batch_begin(self, batch, logs=None):
        self.now_s += self.validation_s / 2


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    of = functools.partial(stepsave.SaveFrequency.of, clock=clock)
    monkeypatch.setattr(frequency.SaveFrequency, "of", of)
    return clock


@pytest.fixture
def steady_saves(monkeypatch):
    """Each save costs 0.02 s and is durable after 0.5 s, by what is measured; it is so at once."""
    original = Checkpointer.save_leaves

    def save_leaves(self, *args, **kwargs):
        handle = original(self, *args, **kwargs)
        handle.wait(60)
        handle.stall_s, handle._durable_s = 0.02, 0.5
        return handle

    monkeypatch.setattr(Checkpointer, "save_leaves", save_leaves)


# By time.


@pytest.mark.parametrize("resume", ["batch", "epoch"])
def test_saves_by_time_come_when_so_much_time_has_passed(resume, clock, backup_dir, saves):
    callback = BackupAndRestore(backup_dir, "3s", resume=resume)
    fit(small_model(), clock, callback, epochs=3)
    steps = [step for step, *_ in saves]
    # Where Keras dispatches batches to threads it is asked as the next one begins, and the clock
    # here has gone on by then.
    early = 3 - steps[0]
    assert early == 0 if resume == "batch" else early in (0, 1)
    assert steps[:2] == [3 - early, 6 - early]
    apart = [after - before for before, after in itertools.pairwise(steps)]
    assert set(apart) <= {3, 4}
    assert all(step == iterations for step, _, _, iterations in saves)


def test_by_time_ends_of_epochs_are_not_special(clock, backup_dir, saves):
    fit(small_model(), clock, BackupAndRestore(backup_dir, "100s"), epochs=3)
    assert saves == []


def test_the_time_of_a_validation_counts(clock, backup_dir, saves):
    clock.validation_s = 20.0
    callback = BackupAndRestore(backup_dir, "10s")
    fit(small_model(), clock, callback, epochs=3, validation_data=(X, Y), validation_batch_size=14)
    assert saves == [(8, 1, 1, 8), (15, 2, 1, 15)]  # at the first cut after each


@several_steps_per_call
def test_by_time_with_several_steps_per_execution(clock, backup_dir, saves):
    callback = BackupAndRestore(backup_dir, "2s")
    fit(small_model_of(3), clock, callback, epochs=2)
    assert [(step, iterations) for step, _, _, iterations in saves] == [(6, 6), (10, 10), (14, 14)]


def small_model_of(steps):
    model = small_model()
    model.compile("sgd", "mse", steps_per_execution=steps)
    return model


def test_a_resumed_training_counts_from_its_begin(clock, backup_dir, saves):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 5:
                raise InterruptionError

    callback = BackupAndRestore(backup_dir, "3s")
    fit_interrupted(small_model(), clock, callback, Stop())
    leave(callback)
    assert [step for step, *_ in saves] == [3]
    fit(small_model(), clock, BackupAndRestore(backup_dir, "3s"), epochs=2)
    assert [step for step, *_ in saves] == [3, 6, 9, 12]


@pytest.mark.first
@pytest.mark.parametrize("save_freq", ["epoch", 3])
def test_who_does_not_ask_for_time_asks_no_clock(save_freq, clock, backup_dir):
    fit(small_model(), clock, BackupAndRestore(backup_dir, save_freq), epochs=2)
    assert clock.asked == 0


@pytest.mark.usefixtures("steady_saves")
@pytest.mark.parametrize("save_freq", ["30s", "auto"])
def test_a_step_costs_a_look_at_the_clock_at_most(save_freq, clock, backup_dir):
    callback = BackupAndRestore(backup_dir, save_freq)
    fit(small_model(), clock, callback, epochs=40)
    asked_per_step = {"30s": 1.0, "auto": 0.0}[save_freq]
    others = clock.asked - asked_per_step * 40 * STEPS
    assert others <= 8 * (callback.stats().committed + 1)


# "auto".


@pytest.mark.usefixtures("steady_saves")
def test_auto_saves_as_often_as_its_budget_allows(clock, backup_dir, saves):
    callback = BackupAndRestore(backup_dir, "auto", max_overhead=0.002, delete_checkpoint=False)
    model = small_model()
    fit(model, clock, callback, epochs=20)
    steps = [step for step, *_ in saves]
    # Seconds: 0.02 / 0.002 for each save, a tenth of that for the first two, and a margin.
    assert steps[:3] == [3, 4, 5]
    assert {after - before for before, after in itertools.pairwise(steps[2:])} == {12}
    assert callback.stats().committed == len(steps)
    assert stepsave.restore(backup_dir).step == steps[-1]
    text = callback.frequency
    assert text.startswith("save_freq='auto': a save every 12 steps (12 s), as the budget")
    assert "it holds up training for 20 ms and is durable after 500 ms, a step takes 1 s." in text


@pytest.mark.usefixtures("steady_saves")
def test_auto_says_what_it_has_chosen_once(clock, backup_dir, capsys):
    keras.config.enable_interactive_logging()
    callback = BackupAndRestore(backup_dir, "auto", max_overhead=0.002, verbose=1)
    assert callback.frequency == ""
    fit(small_model(), clock, callback, epochs=20)
    told = [line for line in capsys.readouterr().out.splitlines() if "save_freq" in line]
    assert told == [callback.frequency]


@pytest.mark.usefixtures("steady_saves")
def test_auto_is_silent_unless_asked(clock, backup_dir, capsys):
    keras.config.enable_interactive_logging()
    callback = BackupAndRestore(backup_dir, "auto", max_overhead=0.002)
    fit(small_model(), clock, callback, epochs=20)
    assert capsys.readouterr().out == ""
    assert "a save every" in callback.frequency


@pytest.mark.usefixtures("steady_saves")
@pytest.mark.parametrize(("mtbf_s", "apart"), [(1e5, 64), (1.0, 12)])
def test_auto_with_failures(mtbf_s, apart, clock, backup_dir, saves):
    callback = BackupAndRestore(backup_dir, "auto", max_overhead=0.002, mtbf_s=mtbf_s)
    fit(small_model(), clock, callback, epochs=60)
    steps = [step for step, *_ in saves]
    assert steps[-1] - steps[-2] == apart  # sqrt(2 * 0.02 * 1e5), and what the budget allows
    assert ("Young/Daly" in callback.frequency) == (apart == 64)


@pytest.mark.usefixtures("steady_saves")
def test_auto_does_not_count_the_time_of_a_validation(clock, backup_dir, saves):
    clock.validation_s = 1000.0
    callback = BackupAndRestore(backup_dir, "auto", max_overhead=0.002)
    options = {"validation_data": (X, Y), "validation_batch_size": 14}
    fit(small_model(), clock, callback, epochs=20, **options)
    steps = [step for step, *_ in saves]
    assert steps[-1] - steps[-2] == 12
    assert "a step takes 1 s" in callback.frequency


def test_with_a_real_clock_auto_saves_and_restores(backup_dir):
    callback = BackupAndRestore(backup_dir, "auto", max_overhead=1, delete_checkpoint=False)
    fit(small_model(), callback, epochs=30)
    stats = callback.stats()
    assert stats.committed >= 1
    assert stats.skipped == stats.failed == 0
    assert 3 <= stepsave.restore(backup_dir).step <= 30 * STEPS


# Interrupted and resumed, bit for bit.

uninterrupted = functools.cache(train)


@pytest.mark.usefixtures("steady_saves")
@pytest.mark.parametrize("save_freq", ["2s", "auto"])
@pytest.mark.parametrize("where", ["middle", "validation"])
def test_a_training_goes_on_bit_for_bit(save_freq, where, clock, backup_dir, saves):
    options = {"max_overhead": 0.02} if save_freq == "auto" else {}
    backup = BackupAndRestore(backup_dir, save_freq, **options)
    with pytest.raises(StopError):
        train("arrays", backup, Interrupt(where, "exception", backup), before=(clock,))
    backup._saver.close()
    at = saves[-1][0]
    assert at > EXACT_STEPS
    again = BackupAndRestore(backup_dir, save_freq, **options)
    found = train(
        "arrays",
        again,
        Interrupt(where, "exception", again, first_epoch=1, batch=-1, interrupted_epoch=99),
        before=(clock,),
    )
    assert not found.differences(uninterrupted("arrays"))
    assert [step for step, *_ in saves if step > at]
    assert saves[-1][0] <= EPOCHS * EXACT_STEPS


# What is wrong, says so.


@pytest.mark.parametrize("save_freq", ["0s", "30", "5m", "-1s", "Auto", "1e3s", "inf"])
def test_a_text_that_is_no_time_is_refused(save_freq, backup_dir):
    text = rf"`save_freq`. Received: save_freq={save_freq}. Expected 'epoch'.*'5min'.*'auto'"
    with pytest.raises(ValueError, match=text):
        BackupAndRestore(backup_dir, save_freq)
    assert not backup_dir.exists()


@pytest.mark.parametrize("save_freq", ["30s", "5 min", "1.5h", "auto"])
def test_times_are_taken_as_they_are_given(save_freq, backup_dir):
    assert BackupAndRestore(backup_dir, save_freq).save_freq == save_freq


@pytest.mark.parametrize(
    "options",
    [{"max_overhead": 0}, {"max_overhead": 2}, {"max_overhead": float("nan")}, {"mtbf_s": -1}],
)
def test_what_goes_with_auto_is_checked(options, backup_dir):
    (name,) = options
    with pytest.raises(ValueError, match=rf"Invalid value for argument `{name}`. Received: {name}"):
        BackupAndRestore(backup_dir, "auto", **options)


@pytest.mark.parametrize("save_freq", ["epoch", 5, "30s"])
@pytest.mark.parametrize("options", [{"max_overhead": 0.1}, {"mtbf_s": 3600}])
def test_what_goes_with_auto_is_refused_without_it(save_freq, options, backup_dir):
    with pytest.raises(ValueError, match=r"It goes with 'auto' only, not with "):
        BackupAndRestore(backup_dir, save_freq, **options)
