"""Several fits with one backup directory: in a script that is run again, and in a loop."""

import contextlib

import keras
import numpy as np
import pytest
from keras_support import STEPS, Interrupt, InterruptionError, fit, leave, state_of, to_numpy

import stepsave
from stepsave import ChangedTrainingWarning
from stepsave.fit import phases
from stepsave.fit.phases import BackupOf, Phases

pytestmark = pytest.mark.first

X = np.random.default_rng(0).normal(size=(48, 3)).astype("float32")
Y = X[:, :1]


@pytest.fixture(autouse=True)
def _new_process(monkeypatch):
    """What a process knows of its fits is gone in the next one; see `new_process` below."""
    monkeypatch.setattr(phases, "_ended", {})


def new_process(monkeypatch):
    monkeypatch.setattr(phases, "_ended", {})


def two_layers():
    base = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="b")], name="base")
    layers = [keras.Input((3,)), base, keras.layers.Dense(1, name="o")]
    return keras.Sequential(layers, name="m"), base


def two_phases(backup_dir, kind, *, ends_in=None, **arguments):
    """The head first, then all layers; or a lower rate, or another loss, or a rate that is set."""
    keras.utils.set_random_seed(1)
    model, base = two_layers()
    base.trainable = kind != "layers"
    epochs = []
    for phase in range(2):
        if phase == 0 or kind != "rate is set":
            base.trainable = base.trainable or phase == 1
            rate = 0.01 if kind == "rate" and phase == 1 else 0.1
            loss = "mae" if kind == "loss" and phase == 1 else "mse"
            model.compile(keras.optimizers.Adam(rate), loss)
        else:
            model.optimizer.learning_rate = 0.01
        callbacks = []
        if backup_dir:
            callbacks.append(stepsave.BackupAndRestore(backup_dir, **arguments))
        if phase == ends_in:
            callbacks.append(Interrupt(epoch_begin=2))
        try:
            history = model.fit(
                X, Y, batch_size=8, epochs=3, verbose=0, shuffle=False, callbacks=callbacks
            )
        except InterruptionError:
            leave(callbacks[0])
            raise
        epochs.append(history.epoch)
    return state_of(model), epochs


@pytest.mark.parametrize("deletes", [True, False])
@pytest.mark.parametrize("kind", ["layers", "rate", "rate is set", "loss"])
def test_a_script_that_was_killed_in_its_second_phase_goes_on_there(
    kind, deletes, backup_dir, monkeypatch
):
    expected, _ = two_phases(None, kind)
    begins_anew = contextlib.nullcontext() if deletes else pytest.warns(ChangedTrainingWarning)
    with begins_anew, pytest.raises(InterruptionError):
        two_phases(backup_dir, kind, ends_in=1, delete_checkpoint=deletes)
    new_process(monkeypatch)
    with pytest.warns(ChangedTrainingWarning, match="of a later `fit` .* trains nothing now"):
        found, epochs = two_phases(backup_dir, kind, delete_checkpoint=deletes)
    assert epochs == [[], [2]]
    assert found == expected
    assert backup_dir.exists() != deletes


def test_one_whose_end_is_not_known_does_not_write_over_the_backup_of_a_later_fit(
    backup_dir, monkeypatch
):
    class WithoutEnd(stepsave.BackupAndRestore):
        def set_params(self, params):
            super().set_params({name: params[name] for name in params if name != "epochs"})

    expected, _ = two_phases(None, "rate")
    with pytest.raises(InterruptionError):
        two_phases(backup_dir, "rate", ends_in=1)
    new_process(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(stepsave, "BackupAndRestore", WithoutEnd)
        with pytest.raises(stepsave.BackupMismatchError, match="cannot be passed over"):
            two_phases(backup_dir, "rate")
    new_process(monkeypatch)
    with pytest.warns(ChangedTrainingWarning, match="of a later `fit` .* trains nothing now"):
        found, epochs = two_phases(backup_dir, "rate")
    assert epochs == [[], [2]]
    assert found == expected


@pytest.mark.parametrize("kind", ["layers", "rate"])
def test_a_script_that_was_killed_in_its_first_phase_goes_on_there(kind, backup_dir, monkeypatch):
    expected, _ = two_phases(None, kind)
    with pytest.raises(InterruptionError):
        two_phases(backup_dir, kind, ends_in=0)
    new_process(monkeypatch)
    found, epochs = two_phases(backup_dir, kind)
    assert epochs == [[2], [0, 1, 2]]
    assert found == expected


def test_a_second_phase_begins_anew_beside_the_kept_backup_of_the_first(backup_dir):
    expected, _ = two_phases(None, "rate")
    with pytest.warns(ChangedTrainingWarning, match="of an earlier `fit` .* begins anew"):
        found, epochs = two_phases(backup_dir, "rate", delete_checkpoint=False)
    assert epochs == [[0, 1, 2]] * 2
    assert found == expected


def test_another_model_does_not_take_the_place_of_a_kept_backup(backup_dir):
    model, _ = two_layers()
    model.compile("sgd", "mse")
    fit(model, stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False), epochs=1)
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(7), keras.layers.Dense(1)])
    other.compile("adam", "mse")
    refused = stepsave.BackupAndRestore(backup_dir)
    with pytest.raises(stepsave.BackupMismatchError):
        fit(other, refused, epochs=1)
    leave(refused)
    assert (backup_dir / "COMMIT").exists()


def loop(backup_dir, *, interrupted=False, **arguments):
    keras.utils.set_random_seed(1)
    model, _ = two_layers()
    model.compile("adam", "mse")
    trained = []
    for epoch in range(5):
        callback = stepsave.BackupAndRestore(backup_dir, 2, **arguments)
        callbacks = [callback, Interrupt(step=3) if interrupted and epoch == 2 else Interrupt()]
        try:
            history = model.fit(
                X,
                Y,
                batch_size=8,
                initial_epoch=epoch,
                epochs=epoch + 1,
                verbose=0,
                callbacks=callbacks,
            )
        except InterruptionError:
            leave(callback)
            raise
        trained += history.epoch
    return state_of(model), trained


@pytest.mark.parametrize("deletes", [True, False])
def test_a_loop_of_fits_goes_on_where_it_was_killed(deletes, backup_dir, tmp_path, monkeypatch):
    expected, trained = loop(tmp_path / "other")
    assert trained == [0, 1, 2, 3, 4]
    with pytest.raises(InterruptionError):
        loop(backup_dir, interrupted=True, delete_checkpoint=deletes)
    new_process(monkeypatch)
    with pytest.warns(ChangedTrainingWarning, match="from epoch 3, and this `fit` ends with epoch"):
        found, trained = loop(backup_dir, delete_checkpoint=deletes)
    # A backup that is kept is of the last batch of an epoch, whose end then comes once more.
    assert trained == ([2, 3, 4] if deletes else [2, 2, 3, 3, 4])
    assert found == expected


def test_a_backup_beyond_fewer_epochs_is_kept_for_a_fit_with_more(backup_dir):
    callback = stepsave.BackupAndRestore(backup_dir, 3)
    model, _ = two_layers()
    model.compile("sgd", "mse")
    with pytest.raises(InterruptionError):
        fit(model, callback, Interrupt(step=2 * STEPS + 4), epochs=5)
    leave(callback)
    fewer, _ = two_layers()
    fewer.compile("sgd", "mse")
    with pytest.warns(ChangedTrainingWarning, match="leaves the backup to a `fit` with more"):
        history = fit(fewer, stepsave.BackupAndRestore(backup_dir), epochs=2)
    assert history.epoch == []
    more, _ = two_layers()
    more.compile("sgd", "mse")
    assert fit(more, stepsave.BackupAndRestore(backup_dir), epochs=5).epoch == [2, 3, 4]
    assert not backup_dir.exists()


def test_a_fit_of_the_same_kind_and_another_number_is_gone_on_with_and_doubted(
    backup_dir, monkeypatch
):
    """As the folds of a cross-validation, which nothing tells apart."""

    def fold(*callbacks):
        keras.utils.clear_session()
        model, _ = two_layers()
        model.compile("sgd", "mse")
        backup = stepsave.BackupAndRestore(backup_dir, 3)
        try:
            fit(model, backup, *callbacks, epochs=2)
        except InterruptionError:
            leave(backup)

    fold()
    fold(Interrupt(step=STEPS + 4))
    new_process(monkeypatch)
    with pytest.warns(ChangedTrainingWarning, match="`fit` number 2 .* and this is number 1"):
        fold()


def test_a_rate_that_compile_is_given_and_the_backup_overrides_is_said(backup_dir, monkeypatch):
    def train(rate, *callbacks):
        keras.utils.clear_session()
        model, _ = two_layers()
        model.compile(keras.optimizers.SGD(rate), "mse")
        fit(model, *callbacks, epochs=2)
        return float(to_numpy(model.optimizer._learning_rate))

    backup = stepsave.BackupAndRestore(backup_dir, 3)
    with pytest.raises(InterruptionError):
        train(0.5, backup, Interrupt(step=STEPS + 4))
    leave(backup)
    new_process(monkeypatch)
    again = stepsave.BackupAndRestore(backup_dir, 3)
    with pytest.warns(ChangedTrainingWarning, match=r"learning rate 0.5, now 0.25.* 0.5, is used"):
        assert train(0.25, again) == 0.5


def test_a_rate_that_a_callback_has_changed_is_not_taken_for_the_users(tmp_path):
    model, _ = two_layers()
    model.compile(keras.optimizers.SGD(0.5), "mse")
    first = Phases(tmp_path, model)
    document = first.to_json()
    model.optimizer.learning_rate = 0.25  # within fit
    first.end()
    assert Phases(tmp_path, model).place(document) is BackupOf.THIS_FIT
    model.optimizer.learning_rate = 0.125  # by the user
    assert Phases(tmp_path, model).place(document) is BackupOf.EARLIER_FIT


def test_phases_that_are_none_are_refused(tmp_path):
    model, _ = two_layers()
    model.compile("sgd", "mse")
    for document in ({}, {"trained": 1}, [], "text"):
        with pytest.raises(stepsave.CorruptBackupError, match="Expected a phase"):
            Phases(tmp_path, model).place(document)


def test_a_backup_without_a_phase_is_gone_on_with(tmp_path):
    model, _ = two_layers()
    model.compile("sgd", "mse")
    assert Phases(tmp_path, model).place(None) is BackupOf.THIS_FIT
    assert Phases(tmp_path, model).doubt(None) is None
