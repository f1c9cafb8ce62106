"""Several callbacks of stepsave in one `fit`."""
# ruff: noqa: ARG002  callbacks have Keras's signatures

import signal

import keras
import pytest
from keras_support import (
    STEPS,
    Interrupt,
    InterruptionError,
    fit,
    leave,
    step_directories,
    step_model,
    step_numbers,
)

import stepsave
from stepsave import BackupAndRestore

pytestmark = pytest.mark.first


def pair(directory, fast=3, slow="epoch", **arguments):
    return (
        BackupAndRestore(directory / "fast", fast, **arguments),
        BackupAndRestore(directory / "slow", slow, **arguments),
    )


def interrupted(callbacks, step):
    model = step_model()
    with pytest.raises(InterruptionError):
        fit(model, *callbacks, Interrupt(step=step), epochs=4)
    for callback in callbacks:
        leave(callback)


class Steps(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.count = 0

    def on_train_batch_end(self, batch, logs=None):
        self.count += 1


@pytest.mark.parametrize("resume", ["batch", "epoch"])
@pytest.mark.parametrize("order", [1, -1])
def test_both_save_and_the_newest_backup_is_gone_on_from(order, resume, tmp_path):
    callbacks = pair(tmp_path, resume=resume)[::order]
    interrupted(callbacks, 2 * STEPS + 5)  # fast: 18; slow: 14
    assert step_directories(tmp_path / "fast") == [18]
    assert step_directories(tmp_path / "slow") == [14]
    model, steps = step_model(), Steps()
    fit(model, *pair(tmp_path, resume=resume)[::order], steps, epochs=4)
    repeated = 0 if resume == "batch" else 4
    assert steps.count == 4 * STEPS - 18 + repeated
    assert step_numbers(model) == {4 * STEPS + repeated}
    assert not (tmp_path / "fast").exists()
    assert not (tmp_path / "slow").exists()


@pytest.mark.parametrize("order", [1, -1])
def test_both_count_on_from_the_newest_and_save_again(order, tmp_path):
    interrupted(pair(tmp_path)[::order], 2 * STEPS + 5)
    callbacks = pair(tmp_path, delete_checkpoint=False)[::order]
    fit(step_model(), *callbacks, epochs=4)
    assert step_directories(tmp_path / "fast") == [27]
    assert step_directories(tmp_path / "slow") == [28]
    fast, slow = pair(tmp_path)
    model = step_model()
    with pytest.warns(stepsave.ChangedTrainingWarning, match="trains nothing"):
        fit(model, fast, slow, epochs=4)
    assert step_numbers(model) == {4 * STEPS}


@pytest.mark.parametrize("order", [1, -1])
def test_a_backup_that_only_one_has_is_gone_on_from(order, tmp_path):
    fast, _ = pair(tmp_path)
    interrupted([fast], 5)
    model = step_model()
    steps = Steps()
    fit(model, *pair(tmp_path)[::order], steps, epochs=4)
    assert steps.count == 4 * STEPS - 3
    assert step_numbers(model) == {4 * STEPS}


@pytest.mark.parametrize("order", [1, -1])
def test_ways_to_resume_may_differ(order, tmp_path):
    """The one that goes on at a batch is newer, or older than the one that repeats the epoch."""
    for fast_resume, slow_resume in (("batch", "epoch"), ("epoch", "batch")):
        root = tmp_path / fast_resume

        def both(root=root, fast_resume=fast_resume, slow_resume=slow_resume):
            return [
                BackupAndRestore(root / "fast", 3, resume=fast_resume),
                BackupAndRestore(root / "slow", "epoch", resume=slow_resume),
            ][::order]

        interrupted(both(), 2 * STEPS + 5)
        model = step_model()
        fit(model, *both(), epochs=4)
        repeated = 4 if fast_resume == "epoch" else 0
        assert step_numbers(model) == {4 * STEPS + repeated}


class Kill(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 4:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("order", [1, -1])
def test_a_signal_has_each_save_that_is_asked_to_before_fit_ends(order, tmp_path):
    callbacks = pair(tmp_path, fast=False, slow=False, save_before_preemption=True)[::order]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(stepsave.Preempted):
        fit(step_model(), *callbacks, Kill(), epochs=2)
    for callback in callbacks:
        leave(callback)
    # The second may see the signal at the cut before the first does.
    for name in ("fast", "slow"):
        (step,) = step_directories(tmp_path / name)
        assert step in (5, 6)
    assert signal.getsignal(signal.SIGTERM) is before
    model = step_model()
    fit(model, *pair(tmp_path, save_before_preemption=True), epochs=2)
    assert step_numbers(model) == {2 * STEPS}
