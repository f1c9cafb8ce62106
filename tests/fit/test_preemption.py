"""Signals that end a training: it is saved first, wherever it is."""
# ruff: noqa: ARG001, ARG002  callbacks have Keras's signatures

import os
import re
import signal
import threading
import warnings

import keras
import pytest
from keras_support import (
    BACKEND,
    BATCH,
    STEPS,
    Child,
    InterruptionError,
    X,
    Y,
    fit,
    leave,
    restored,
    step_model,
    step_numbers,
)

import stepsave
from stepsave import BackupAndRestore, Preempted
from stepsave.fit.preemption import PreemptionSignals
from stepsave.testing import FaultStore


def preemptible(backup_dir, **kwargs):
    return BackupAndRestore(backup_dir, save_freq=False, save_before_preemption=True, **kwargs)


class Kill(keras.callbacks.Callback):
    """Sends a signal to the process that trains, at a batch of training or of validation."""

    def __init__(self, batch=None, test_batch=None, signum=signal.SIGTERM, times=1):
        super().__init__()
        self.batch, self.test_batch, self.signum, self.times = batch, test_batch, signum, times

    def kill(self):
        # To this thread: one to the process may be taken by another, a little later, and two
        # that come before Python has looked count as one.
        for _ in range(self.times):
            signal.raise_signal(self.signum)

    def on_train_batch_begin(self, batch, logs=None):
        if batch == self.batch:
            self.kill()

    def on_test_batch_begin(self, batch, logs=None):
        if batch == self.test_batch:
            self.kill()


# To repeat the epoch it is saved before the step that the signal came ahead of.
@pytest.mark.parametrize(("resume", "step"), [("batch", 4), ("epoch", 3)])
def test_the_step_is_finished_and_saved_before_fit_ends(resume, step, backup_dir):
    callback = preemptible(backup_dir, resume=resume)
    with pytest.raises(Preempted, match=f"SIGTERM: step {step} is saved") as caught:
        fit(step_model(), Kill(batch=3), callback, epochs=2)
    assert caught.value.code == Preempted.EXIT_CODE == 75
    assert (caught.value.signum, caught.value.step) == (signal.SIGTERM, step)
    assert 0 <= caught.value.waited_s < 60
    assert callback._saver.committed.step == step  # it is durable by then
    leave(callback)
    model = step_model()
    restored(model, backup_dir)
    assert step_numbers(model) == {step}


@pytest.mark.parametrize("resume", ["batch", "epoch"])
def test_a_signal_during_validation_does_not_wait_for_its_end(resume, backup_dir):
    tested = []

    class Watch(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            tested.append(batch)

    callback = preemptible(backup_dir, resume=resume)
    with pytest.raises(Preempted, match=f"step {STEPS} is saved"):
        fit(step_model(), Kill(test_batch=1), callback, Watch(), validation_data=(X, Y))
    assert tested == [0]
    leave(callback)
    model = step_model()
    restored(model, backup_dir)
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == STEPS


def test_a_signal_on_the_way_through_trained_batches_does_not_wait_for_its_end(backup_dir):
    reads = []

    def rows(preempt_at=None):
        for batch in range(STEPS):
            reads.append(batch)
            if batch == preempt_at:
                signal.raise_signal(signal.SIGTERM)
            yield X[batch * BATCH :][:BATCH], Y[batch * BATCH :][:BATCH]

    def train(data, *callbacks):
        model = step_model()
        model.fit(data, steps_per_epoch=STEPS, shuffle=False, verbose=0, callbacks=list(callbacks))
        return step_numbers(model)

    for data, others in [(rows(), [Kill(batch=4)]), (rows(preempt_at=3), [])]:
        reads.clear()
        callback = preemptible(backup_dir)
        with pytest.raises(Preempted, match="step 5 is saved"):
            train(data, *others, callback)
        leave(callback)
    # The last data was left where the signal came, but by `tf.data`, which reads as it likes.
    assert BACKEND == "tensorflow" or reads == [0, 1, 2, 3]
    assert train(rows(), preemptible(backup_dir)) == {STEPS}


def test_nothing_is_saved_twice(backup_dir, saves):
    callback = BackupAndRestore(backup_dir, 4, save_before_preemption=True)
    with pytest.raises(Preempted, match="step 4 is saved"):
        fit(step_model(), Kill(batch=3), callback)
    assert [step for step, *_ in saves] == [4]
    leave(callback)


def test_without_periodic_saves_nothing_is_saved_if_no_signal_comes(backup_dir, saves):
    fit(step_model(), preemptible(backup_dir), epochs=2)
    assert saves == []
    assert not backup_dir.exists()


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT", "SIGTERM"])
def test_other_signals_may_be_asked_for(name, backup_dir):
    signum = signal.Signals[name]
    before = signal.getsignal(signum)
    callback = preemptible(backup_dir, preemption_signals=[name])
    with pytest.raises(Preempted, match=name):
        fit(step_model(), Kill(batch=2, signum=signum), callback)
    assert signal.getsignal(signum) == before
    leave(callback)


@pytest.mark.parametrize("wrong", ["SIGKILL", "TERM", 0, 10_000])
def test_a_signal_that_no_process_can_handle_is_refused(wrong, backup_dir):
    with pytest.raises(ValueError, match=re.escape(repr(wrong))):
        preemptible(backup_dir, preemption_signals=[wrong])


@pytest.fixture
def heard():
    """Notes SIGTERMs by a handler of the user's."""
    signals = []

    def note(signum, frame):
        signals.append(signum)

    before = signal.signal(signal.SIGTERM, note)
    yield signals, note
    assert signal.getsignal(signal.SIGTERM) == note
    signal.signal(signal.SIGTERM, before)


def test_the_handler_before_is_called_when_all_is_saved_and_put_back(backup_dir, heard):
    signals, _ = heard
    callback = preemptible(backup_dir)
    with pytest.raises(Preempted):
        fit(step_model(), Kill(batch=2, times=3), callback)
    assert signals == [signal.SIGTERM]
    leave(callback)


def test_a_completed_fit_puts_the_handler_before_back(backup_dir, heard):
    _, note = heard
    fit(step_model(), preemptible(backup_dir))
    assert signal.getsignal(signal.SIGTERM) == note


def test_a_forked_worker_is_ended_by_the_signal_as_it_would_be_without_us(backup_dir, heard):
    """A pool that loads data ends its workers by SIGTERM, wherever they are."""
    _, note = heard
    handlers, statuses = [], []

    class Forking(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            handlers.append(signal.getsignal(signal.SIGTERM))
            if not statuses:
                thread = threading.Thread(target=fork)
                thread.start()
                thread.join(60)

    def fork():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the process has more threads than one
            pid = os.fork()
        if pid == 0:
            os._exit(0 if signal.getsignal(signal.SIGTERM) == note else 1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    fit(step_model(), preemptible(backup_dir), Forking())
    assert statuses == [0]
    assert len(handlers) == STEPS
    assert all(handler != note for handler in handlers), "those of the training stay"


def test_after_a_fit_that_raised_a_signal_goes_to_the_handler_before(backup_dir, heard):
    signals, _ = heard

    class Fail(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            raise InterruptionError

    callback = preemptible(backup_dir)
    with pytest.raises(InterruptionError):
        fit(step_model(), Fail(), callback)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals == [signal.SIGTERM]
    leave(callback)


@pytest.fixture
def _interruptible():
    """SIGINT as in a terminal; a shell that starts a process in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_a_second_sigint_is_not_made_to_wait(backup_dir):
    callback = preemptible(backup_dir, preemption_signals=["SIGINT"])
    with pytest.raises(KeyboardInterrupt):
        fit(step_model(), Kill(batch=2, signum=signal.SIGINT, times=2), callback)
    leave(callback)


def test_off_the_main_thread_nothing_is_installed_and_that_is_said(backup_dir):
    before = signal.getsignal(signal.SIGTERM)
    found = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            found.append(signal.getsignal(signal.SIGTERM))

    def train():
        with pytest.warns(UserWarning, match="Call `fit` on the main thread"):
            fit(step_model(), preemptible(backup_dir), Look())

    thread = threading.Thread(target=train, name="trainer")
    thread.start()
    thread.join()
    assert found == [before] * STEPS


@pytest.mark.parametrize(("grace_period_s", "told"), [(0.0, 1), (600.0, 0), (None, 0)])
def test_a_grace_period_that_was_too_short_is_reported(grace_period_s, told, backup_dir, caplog):
    callback = preemptible(backup_dir, grace_period_s=grace_period_s)
    with pytest.raises(Preempted):
        fit(step_model(), Kill(batch=2), callback)
    assert sum("grace period" in record.getMessage() for record in caplog.records) == told
    leave(callback)


def test_a_save_that_fails_is_raised_instead(backup_dir):
    store = FaultStore(backup_dir)
    store.fail("write", path="*/training.json")
    callback = preemptible(store)
    with pytest.raises(stepsave.SaveFailedError):
        fit(step_model(), Kill(batch=2), callback)


_SCRIPT = """
import os, signal, sys
from keras_support import *

class Kill(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 3 and sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGTERM)

backup = stepsave.BackupAndRestore(sys.argv[1], save_freq=False, save_before_preemption=True)
model = step_model()
history = fit(model, backup, Kill(), epochs=2)
print(step_numbers(model), history.epoch)
"""


@pytest.mark.slow
def test_a_plain_script_ends_without_a_traceback_and_goes_on_when_run_again(backup_dir):
    out, err = Child(_SCRIPT, backup_dir, "kill").wait(returncode=Preempted.EXIT_CODE)
    assert out == ""
    assert "Traceback" not in err
    out, _ = Child(_SCRIPT, backup_dir, "").wait()
    assert out.strip() == f"{{{float(2 * STEPS)}}} [0, 1]"


def test_handlers_may_be_removed_in_any_order():
    """The callback of an interrupted fit goes when its traceback does, under a later one."""
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append("before"))
    try:
        layers = [PreemptionSignals(lambda _: False) for _ in range(3)]
        for layer in layers:
            layer.install([signal.SIGUSR1], None)
        for layer in (layers[1], layers[0], layers[2]):
            layer.remove()
        signal.raise_signal(signal.SIGUSR1)
        assert received == ["before"]
        for layer in layers:
            layer.install([signal.SIGUSR1], None)
        layers[0].remove()
        signal.raise_signal(signal.SIGUSR1)  # passes through those that are left
        assert received == ["before"] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)
