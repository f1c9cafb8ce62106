"""Exact resume with everything that `fit` and `compile` can be asked for."""
# ruff: noqa: ARG002  callbacks have Keras's signatures

import contextlib
import functools
import os
import shutil
import signal
import warnings

import keras
import numpy as np
import pytest
from exact_sources import BACKEND, Rows
from exact_support import EPOCHS, Interrupt, StopError, make_model, train
from keras_support import several_steps_per_call
from rows import BATCH, SAMPLES, STEPS, samples

import stepsave

uninterrupted = functools.cache(train)


def interrupted(directory, *, save_freq=3, where="middle", source="arrays", **kwargs):
    """Interrupts a training, and returns what the one that resumes it leaves behind."""
    backup = stepsave.BackupAndRestore(directory, save_freq)
    with pytest.raises(StopError):
        train(source, backup, Interrupt(where, "exception", backup), **kwargs)
    backup._saver.close()
    return train(source, stepsave.BackupAndRestore(directory, save_freq), **kwargs)


def optimizer(**kwargs):
    return lambda: make_model(keras.optimizers.Adam(0.05, **kwargs))


def compiled(**kwargs):
    return lambda: make_model(**kwargs)


CASES = {
    "gradient accumulation": {"model": optimizer(gradient_accumulation_steps=3)},
    "moving averages of weights": {"model": optimizer(use_ema=True, ema_overwrite_frequency=4)},
    "loss scaling": {
        "model": lambda: make_model(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    },
    "a schedule": {
        "model": lambda: make_model(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 30))
        ),
        "rate_callbacks": False,
    },
    "eager": {"model": compiled(run_eagerly=True)},
    "not compiled": {"model": compiled(jit_compile=False)},
    "class_weight": {"arguments": {"class_weight": {0: 0.3, 1: 2.0}}},
    "initial_epoch": {"arguments": {"initial_epoch": 1}},
    "steps_per_epoch": {"arguments": {"steps_per_epoch": STEPS}},
    "validation_freq": {"arguments": {"validation_freq": 2}},
}
if BACKEND != "torch":  # which does not compile here
    CASES["compiled"] = {"model": compiled(jit_compile=True)}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if i % 2 else []) for i, n in enumerate(CASES)],
)
@pytest.mark.first
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.filterwarnings("ignore:Early stopping conditioned on metric")
def test_a_training_with_it_is_resumed_exactly(name, tmp_path):
    case = CASES[name]
    expected = train("arrays", **case)
    assert not interrupted(tmp_path / "backup", **case).differences(expected)


three_steps_per_call = compiled(steps_per_execution=3)
SLOW_CASES = "PyDataset", "tf.data", "tf.data, repeated"


@pytest.mark.first
@several_steps_per_call
@pytest.mark.parametrize("where", ["middle", "validation"])
@pytest.mark.parametrize(
    "source", ["arrays", *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_several_steps_per_call_are_resumed_exactly(where, source, tmp_path):
    backup = stepsave.BackupAndRestore(tmp_path, 1)
    # Calls begin with batches 0, 3 and 6.
    stop = Interrupt(where, "exception", backup, batch=6)
    with pytest.raises(StopError):
        train(source, backup, stop, model=three_steps_per_call)
    backup._saver.close()
    found = train(source, stepsave.BackupAndRestore(tmp_path, 1), model=three_steps_per_call)
    assert not found.differences(uninterrupted(source, model=three_steps_per_call))


@pytest.mark.first
def test_an_interruption_right_after_the_resume_is_resumed_exactly(tmp_path):
    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        train("tf.data", backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    for _ in range(2):  # no batch is trained, and nothing saved
        backup = stepsave.BackupAndRestore(tmp_path, 3)
        with pytest.raises(StopError):
            train("tf.data", backup, Interrupt("middle", "exception", backup))
        assert backup._saved_step == 12
        backup._saver.close()
    found = train("tf.data", stepsave.BackupAndRestore(tmp_path, 3))
    assert not found.differences(uninterrupted("tf.data"))


@pytest.mark.once
def test_an_interruption_before_the_first_save_is_no_resume(tmp_path):
    found = interrupted(tmp_path, save_freq=100)
    assert not found.differences(uninterrupted("arrays"))
    assert list(found.logs) == list(range(EPOCHS))


@pytest.mark.once
@pytest.mark.parametrize("save_freq", ["epoch", STEPS])
def test_a_completed_training_that_is_run_again_ends_the_same(save_freq, tmp_path):
    expected = train(
        "arrays", stepsave.BackupAndRestore(tmp_path, save_freq, delete_checkpoint=False)
    )
    told = pytest.warns(stepsave.ChangedTrainingWarning, match="All 4 epochs .* trains nothing")
    # The last save with 7 is made before the validation, which is then run again.
    with told if save_freq == "epoch" else contextlib.nullcontext():
        found = train(
            "arrays", stepsave.BackupAndRestore(tmp_path, save_freq, delete_checkpoint=False)
        )
    assert found.bits == expected.bits
    assert found.callbacks == expected.callbacks


class StopAfter(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == 1


@pytest.mark.once
def test_a_training_that_a_callback_stopped_and_that_then_died_is_not_gone_on_with(tmp_path):
    class Die(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            raise StopError

    backup = stepsave.BackupAndRestore(tmp_path, delete_checkpoint=False)
    with pytest.raises(StopError):
        train("arrays", more=[Die(), backup, StopAfter()])
    backup._saver.close()
    expected = train("arrays", more=[StopAfter()])
    with pytest.warns(stepsave.ChangedTrainingWarning, match="nothing is left to train"):
        found = train("arrays", stepsave.BackupAndRestore(tmp_path))
    assert found.bits == expected.bits  # the best weights were put back once more
    assert found.logs == {}


@pytest.mark.once
def test_a_training_that_ended_as_a_callback_stopped_it_is_gone_on_with(tmp_path):
    """As jobs with a time limit do, one after the other."""

    def jobs(count):
        for job in range(count):
            more = [] if job == count - 1 else [StopAfter()]
            backup = stepsave.BackupAndRestore(tmp_path / str(count), delete_checkpoint=False)
            yield train("arrays", backup, more=more, rate_callbacks=False, best=False)

    *_, expected = jobs(1)
    *_, found = jobs(2)
    assert list(found.logs) == [2, 3]
    assert not found.differences(expected)


@pytest.mark.first
def test_the_callback_changes_nothing_in_a_training(tmp_path):
    backup = stepsave.BackupAndRestore(tmp_path, 1, save_before_preemption=True)
    assert not train("arrays", backup).differences(uninterrupted("arrays"))


@pytest.mark.once
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_the_place_in_the_list_of_callbacks_does_not_matter(first, tmp_path):
    def run(backup, interrupt=None):
        ends = [backup, interrupt] if interrupt else [backup]
        return train("arrays", more=ends if not first else (), before=ends if first else ())

    backup = stepsave.BackupAndRestore(tmp_path)
    with pytest.raises(StopError):
        run(backup, Interrupt("epoch end", "exception", backup))
    backup._saver.close()
    found = run(stepsave.BackupAndRestore(tmp_path))
    assert not found.differences(uninterrupted("arrays"))


# The history.


@pytest.mark.once
def test_the_history_is_that_of_the_epochs_run_now_or_of_all(tmp_path):
    backup = stepsave.BackupAndRestore(tmp_path, 3, history="all")
    with pytest.raises(StopError):
        train("arrays", backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    epochs, values = uninterrupted("arrays").history
    new = train("arrays", stepsave.BackupAndRestore(tmp_path.with_name("copy"), 3))
    assert new.history == (epochs[1:], {name: logs[1:] for name, logs in values.items()})
    found = train("arrays", stepsave.BackupAndRestore(tmp_path, 3, history="all"))
    assert found.history == (epochs, values)


# Averaged weights that are swapped in for validation, or between epochs.


averaged = optimizer(use_ema=True)


@functools.cache
def uninterrupted_with_swaps(swap_on_epoch):
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    return train("arrays", model=averaged, more=[swap])


@pytest.mark.first
@pytest.mark.parametrize("swap_on_epoch", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["middle", "epoch end", "validation"])
@pytest.mark.parametrize("how", ["exception", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_swapped_averages_are_resumed_exactly(swap_on_epoch, where, how, tmp_path):
    def run(*callbacks):
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
        return train("arrays", *callbacks, model=averaged, more=[swap])

    save_freq = "epoch" if where == "epoch end" else 3 if where == "middle" else STEPS
    backup = stepsave.BackupAndRestore(tmp_path, save_freq, save_before_preemption=True)
    with pytest.raises(StopError if how == "exception" else stepsave.Preempted):
        run(backup, Interrupt(where, how, backup))
    backup._saver.close()
    found = run(stepsave.BackupAndRestore(tmp_path))
    assert not found.differences(uninterrupted_with_swaps(swap_on_epoch))


@pytest.mark.once
@pytest.mark.parametrize("how", ["exception", "SIGTERM"])
def test_an_epoch_that_a_callback_cut_short_is_not_trained_on(how, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 4:
                self.model.stop_training = True

    def run(backup=None, interrupt=None):
        return train("arrays", backup, interrupt, more=[Stop()])

    save_freq = 2 if how == "exception" else False
    backup = stepsave.BackupAndRestore(tmp_path, save_freq, save_before_preemption=True)
    with pytest.raises(StopError if how == "exception" else stepsave.Preempted):
        run(backup, Interrupt("validation", how, backup, interrupted_epoch=0))
    assert how == "exception" or backup._saver.committed.step == 5
    backup._saver.close()
    assert not run(stepsave.BackupAndRestore(tmp_path)).differences(run())


# Callbacks that save models.


@pytest.mark.once
@pytest.mark.parametrize("save_freq", ["epoch", 4])
def test_keras_own_checkpoints_are_written_for_the_same_batches(save_freq, tmp_path):
    def run(name, *callbacks):
        saved = []

        class Noting(keras.callbacks.ModelCheckpoint):
            def _save_model(self, epoch, batch, logs):
                saved.append((epoch, batch))

        path = str(tmp_path / f"{name}.weights.h5")
        noting = Noting(path, save_weights_only=True, monitor="loss", save_freq=save_freq)
        try:
            train("arrays", *callbacks, more=[noting])
        except StopError:
            callbacks[0]._saver.close()
        return saved

    expected = run("expected")
    backup = stepsave.BackupAndRestore(tmp_path / "backup", 3)
    before = run("before", backup, Interrupt("middle", "exception", backup))
    after = run("after", stepsave.BackupAndRestore(tmp_path / "backup", 3))
    assert before + after == expected


# What does not fit.


@pytest.mark.first
def test_data_that_is_shorter_than_before_is_refused(tmp_path):
    def batches(count):
        x = np.zeros((2, 5), np.float32)
        for _ in range(count):
            yield x, np.zeros((2, 1), np.float32)

    def fit(count, *callbacks):
        make_model().fit(
            batches(count), steps_per_epoch=8, verbose=0, callbacks=list(callbacks), shuffle=False
        )

    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        fit(8, backup, StopAtBatch(7))
    backup._saver.close()
    with pytest.raises(stepsave.BackupMismatchError, match=r"ends after 4 batches.*after 6"):
        fit(4, stepsave.BackupAndRestore(tmp_path, 3))


class StopAtBatch(keras.callbacks.Callback):
    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_begin(self, batch, logs=None):
        if batch == self.batch:
            raise StopError


@pytest.mark.once
def test_a_fit_that_is_not_that_of_keras_resumes_at_an_epoch_and_says_so(tmp_path):
    class Own(keras.Model):
        """Calls the hooks of callbacks as a loop of its own."""

        def fit(self, callbacks):
            callbacks = keras.callbacks.CallbackList(callbacks, model=self, epochs=2, steps=1)
            callbacks.on_train_begin()
            assert signal.getsignal(signal.SIGTERM) == before
            callbacks.on_train_end()

    own = Own(*_inputs_and_outputs())
    own.compile("sgd", "mse")
    before = signal.getsignal(signal.SIGTERM)
    for options in ({}, {"resume": "epoch", "save_before_preemption": True}):
        with pytest.warns(UserWarning, match='resume="epoch".*no signals'):
            own.fit([stepsave.BackupAndRestore(tmp_path, **options)])
        assert signal.getsignal(signal.SIGTERM) == before


def _inputs_and_outputs():
    inputs = keras.Input((3,))
    return inputs, keras.layers.Dense(1)(inputs)


@pytest.mark.first
def test_other_callbacks_see_no_batch_that_is_passed_over(tmp_path):
    begun = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_begin(self, batch, logs=None):
            begun.append((self.epoch, batch))

    interrupted(tmp_path, more=[Watch()])
    once = [(epoch, batch) for epoch in range(EPOCHS) for batch in range(STEPS)]
    # The batch that was begun when the training was interrupted is begun again.
    assert begun == sorted([*once, (1, 5)])


@pytest.mark.first
def test_an_epoch_of_another_length_goes_on_by_the_share_that_was_done(tmp_path):
    backup = stepsave.BackupAndRestore(tmp_path / "backup", 3)
    data = {"x": Rows(), "shuffle": False, "verbose": 0}
    model = make_model()
    with pytest.raises(StopError):
        model.fit(**data, callbacks=[backup, StopAtBatch(6)])
    backup._saver.close()
    steps = []
    for length in (5, 6, 7):
        shutil.copytree(tmp_path / "backup", tmp_path / str(length))

        class Shorter(Rows):
            def __len__(self, length=length):
                return length

        again = make_model()
        callback = stepsave.BackupAndRestore(tmp_path / str(length), 3)
        told = pytest.warns(stepsave.ChangedTrainingWarning, match=f"was 7 and is {length}")
        with told if length < 7 else contextlib.nullcontext():
            again.fit(**data | {"x": Shorter()}, callbacks=[callback])
        steps.append(int(keras.ops.convert_to_numpy(again.optimizer.iterations)))
    assert steps == [7, 7, 7]  # after 4 of 5, 5 of 6 and 6 of 7


@pytest.mark.once
def test_no_warning_is_given_for_data_that_comes_again(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", stepsave.UnreproducibleDataWarning)
        train("arrays", stepsave.BackupAndRestore(tmp_path))


assert SAMPLES == BATCH * STEPS - 2


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax reads it from the file
def test_orbax_checkpoint_passes_over_the_steps_that_it_has_saved(tmp_path):
    """Orbax refuses a step that is there, to which a resumed training comes again."""
    orbax = pytest.importorskip("orbax.checkpoint")

    def run(name, step=None):
        keras.utils.set_random_seed(1)
        model = make_model()
        backup = stepsave.BackupAndRestore(tmp_path / name / "backup", 5)
        checkpoint = keras.callbacks.OrbaxCheckpoint(
            str(tmp_path / name / "orbax"), save_freq=2, max_to_keep=None
        )
        more = [StopAtBatch(step)] if step else []
        x, y = samples()
        try:
            model.fit(x, y, batch_size=4, verbose=0, callbacks=[backup, checkpoint, *more])
        except StopError:
            backup._saver.close()
            checkpoint.checkpointer.close()
        return checkpoint.directory

    interrupted = run("a", 6)
    assert {"4", "6"} <= set(os.listdir(interrupted))  # and it goes on after 5
    run("a")
    expected = run("b")
    names = [name for name in os.listdir(expected) if name.isdecimal()]
    assert sorted(name for name in os.listdir(interrupted) if name.isdecimal()) == sorted(names)
    reader = orbax.PyTreeCheckpointer()
    for name in names:
        found, wanted = (
            reader.restore(os.path.join(directory, name, "pytree"))
            for directory in (interrupted, expected)
        )
        for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True):
            np.testing.assert_array_equal(a, b)
