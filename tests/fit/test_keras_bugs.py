"""Bugs of Keras's own callback, shown there, and shown not to be in stepsave's."""
# ruff: noqa: ARG002  callbacks have Keras's signatures

import shutil

import keras
import pytest
from keras_support import (
    BATCH,
    STEPS,
    Interrupt,
    InterruptionError,
    X,
    Y,
    fit,
    fit_interrupted,
    leave,
    restored,
    several_steps_per_call,
    small_model,
    step_model,
    step_numbers,
)

import stepsave
from stepsave.testing import FaultStore

pytestmark = pytest.mark.first

BOTH = pytest.mark.parametrize(
    ("kind", "has_bug"),
    [(keras.callbacks.BackupAndRestore, True), (stepsave.BackupAndRestore, False)],
    ids=["keras", "stepsave"],
)


def release(callback):
    if isinstance(callback, stepsave.BackupAndRestore):
        leave(callback)


@BOTH
def test_a_second_interruption_does_not_rewind_to_epoch_0(kind, has_bug, backup_dir):
    def resume(interrupt):
        callback = kind(str(backup_dir), 1)  # as in a fresh process
        fit_interrupted(step_model(), callback, interrupt, epochs=9)
        release(callback)
        return interrupt.epochs

    assert resume(Interrupt(step=2 * STEPS + 2)) == [0, 1, 2]
    assert resume(Interrupt(step=2)) == [2]
    assert resume(Interrupt(step=2)) == [0 if has_bug else 2]


@BOTH
def test_a_later_fit_of_the_model_does_not_skip_epochs(kind, has_bug, backup_dir):
    model = step_model()
    callback = kind(str(backup_dir))
    fit_interrupted(model, callback, Interrupt(epoch_begin=2), epochs=4)
    assert fit(model, callback, epochs=4).epoch == [2, 3]
    assert fit(model, epochs=3).epoch == ([2] if has_bug else [0, 1, 2])
    assert model._initial_epoch == (2 if has_bug else None)


@BOTH
def test_a_fit_after_a_resume_that_was_interrupted_too_trains_all_its_epochs(
    kind, has_bug, backup_dir
):
    model, callback = small_model(), kind(str(backup_dir))
    fit_interrupted(model, callback, Interrupt(epoch_begin=2), epochs=9)
    fit_interrupted(model, callback, Interrupt(epoch_begin=4), epochs=9)
    assert fit(model, epochs=3).epoch == ([2] if has_bug else [0, 1, 2])
    release(callback)


def test_a_fit_with_no_epoch_left_does_not_leave_its_initial_epoch_either(backup_dir):
    fit(step_model(), stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False), epochs=2)
    model = step_model()
    with pytest.warns(stepsave.ChangedTrainingWarning, match="trains nothing"):
        fit(model, stepsave.BackupAndRestore(backup_dir), epochs=2)
    assert step_numbers(model) == {2 * STEPS}
    assert fit(model, epochs=3).epoch == [0, 1, 2]


@several_steps_per_call
@BOTH
def test_batches_are_not_undercounted_with_several_steps_per_call(
    kind, has_bug, backup_dir, monkeypatch
):
    saved = []
    name = "_save_model" if has_bug else "_save"
    original = getattr(kind, name)

    def save(self, *args):
        saved.append(int(self.model.optimizer.iterations))
        return original(self, *args)

    monkeypatch.setattr(kind, name, save)
    model = step_model(steps_per_execution=2)
    callback = kind(str(backup_dir), 4)
    fit(model, callback, x=X[: 6 * BATCH], y=Y[: 6 * BATCH])
    assert saved == ([6] if has_bug else [4])


@BOTH
def test_save_freq_false_does_not_mean_every_batch(kind, has_bug, backup_dir):
    if has_bug:
        callback = kind(str(backup_dir), save_freq=False)
        assert all(callback._should_save_on_batch(batch) for batch in range(3))
    else:
        with pytest.raises(ValueError, match="Invalid value"):
            kind(str(backup_dir), save_freq=False)


def test_keras_commits_weights_and_epoch_separately(backup_dir):
    model, calls = step_model(), []
    save_weights = model.save_weights

    def save_and_die_at_the_second(**kwargs):
        save_weights(**kwargs)
        calls.append(kwargs)
        if len(calls) == 2:
            raise InterruptionError

    model.save_weights = save_and_die_at_the_second
    fit_interrupted(model, keras.callbacks.BackupAndRestore(str(backup_dir)), epochs=3)
    model, probe = step_model(), Interrupt(train_begin=True)
    fit_interrupted(model, keras.callbacks.BackupAndRestore(str(backup_dir)), probe, epochs=3)
    assert probe.initial_epoch == 1
    assert step_numbers(model) == {2 * STEPS}  # of the end of epoch 2: trained once more now


def test_weights_and_epoch_are_committed_together(backup_dir):
    store = FaultStore(backup_dir)
    store.fail("write", path="*/training.json", nth=2)  # the position cannot be written
    callback = stepsave.BackupAndRestore(store)
    with pytest.raises(stepsave.SaveFailedError, match="step 14 failed"):
        fit(step_model(), callback, epochs=2)
    model = step_model()
    assert restored(model, backup_dir).initial_epoch == 1
    assert step_numbers(model) == {STEPS}


# Resuming, in every way that a training is started again.


def interrupted(backup_dir, save_freq, **when):
    callback = stepsave.BackupAndRestore(backup_dir, save_freq)
    model = step_model()
    fit_interrupted(model, callback, Interrupt(**when), epochs=5)
    return model, callback


def test_the_same_instance_and_model_go_on(backup_dir):
    model, callback = interrupted(backup_dir, 3, step=10)
    assert (callback._current_epoch, callback._last_batch_seen) == (1, 2)
    # The save of step 9 is drained, whether it was durable when `fit` raised or not.
    history = fit(model, callback, epochs=5)
    assert history.epoch == [1, 2, 3, 4]
    assert step_numbers(model) == {5 * STEPS}
    assert callback._current_epoch == 5
    assert not backup_dir.exists()


def test_a_new_instance_takes_over_from_an_interrupted_one_still_alive(backup_dir):
    _, old = interrupted(backup_dir, 3, step=10)
    model = step_model()
    new = stepsave.BackupAndRestore(backup_dir, 3)
    assert fit(model, new, epochs=5).epoch == [1, 2, 3, 4]
    assert step_numbers(model) == {5 * STEPS}
    del old


def test_the_old_instance_can_be_used_again_after_another_took_over(backup_dir):
    _, old = interrupted(backup_dir, "epoch", epoch_begin=2)
    new = stepsave.BackupAndRestore(backup_dir)
    fit_interrupted(step_model(), new, Interrupt(epoch_begin=3), epochs=5)
    model = step_model()
    assert fit(model, old, epochs=5).epoch == [3, 4]
    assert step_numbers(model) == {5 * STEPS}


def test_an_instance_can_back_up_one_fit_after_another(backup_dir):
    callback = stepsave.BackupAndRestore(backup_dir, 2)
    for _ in range(2):
        model = step_model()
        assert fit(model, callback, epochs=2).epoch == [0, 1]
        assert step_numbers(model) == {2 * STEPS}


@pytest.mark.parametrize(
    ("resume", "expected"),
    [
        ("batch", [(12, 1, 5, 12)]),
        ("epoch", [(12, 1, 3, 12), (15, 1, 6, 15)]),  # step 10 is batch 0 of epoch 1
    ],
)
def test_global_steps_go_on_after_a_resume(resume, expected, backup_dir, saves):
    _, callback = interrupted(backup_dir, 3, step=10)
    leave(callback)
    saves.clear()
    fit(step_model(), stepsave.BackupAndRestore(backup_dir, 3, resume=resume), epochs=2)
    assert saves == expected


def test_with_resume_epoch_the_epoch_is_repeated_as_keras_does(backup_dir):
    model, callback = interrupted(backup_dir, 3, step=10)
    leave(callback)
    callback = stepsave.BackupAndRestore(backup_dir, 3, resume="epoch")
    assert fit(model, callback, epochs=5).epoch == [1, 2, 3, 4]
    assert step_numbers(model) == {9 + 4 * STEPS}


def test_an_epoch_whose_batches_are_all_saved_is_not_repeated(backup_dir):
    class FailingValidation(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            raise InterruptionError

    callback = stepsave.BackupAndRestore(backup_dir, STEPS)
    data = keras.ops.zeros((4, 3)), keras.ops.zeros((4, 1))
    fit_interrupted(step_model(), callback, FailingValidation(), epochs=3, validation_data=data)
    leave(callback)
    shutil.copytree(backup_dir, backup_dir.with_name("copy"))
    model = step_model()
    assert fit(model, stepsave.BackupAndRestore(backup_dir), epochs=3).epoch == [0, 1, 2]
    assert step_numbers(model) == {3 * STEPS}  # of epoch 0 only the validation was left
    model = step_model()
    callback = stepsave.BackupAndRestore(backup_dir.with_name("copy"), resume="epoch")
    assert fit(model, callback, epochs=3).epoch == [1, 2]
    assert step_numbers(model) == {3 * STEPS}


def test_an_interruption_before_the_first_save_starts_afresh(backup_dir):
    _, callback = interrupted(backup_dir, 100, step=3)
    leave(callback)
    fresh = step_model()
    assert fit(fresh, stepsave.BackupAndRestore(backup_dir), epochs=2).epoch == [0, 1]
    assert step_numbers(fresh) == {2 * STEPS}


def test_an_interruption_right_after_a_resume_keeps_the_position(backup_dir):
    _, callback = interrupted(backup_dir, "epoch", epoch_begin=3)
    leave(callback)
    for _ in range(3):
        probe = restored(small_step := step_model(), backup_dir)
        assert probe.initial_epoch == 3
        assert probe.callback._current_epoch == 3
        assert step_numbers(small_step) == {3 * STEPS}


def test_a_callback_whose_directory_was_taken_over_says_so(backup_dir):
    class TakeOver(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                restored(small_model(), backup_dir)

    callback = stepsave.BackupAndRestore(backup_dir, 5)
    with pytest.raises(stepsave.StepsaveError, match="another callback"):
        fit(small_model(), callback, TakeOver(), epochs=3)
