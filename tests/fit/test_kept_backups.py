"""Backups before the newest, and the way back to one of them."""

import keras
import numpy as np
import pytest
from keras_support import (
    STEPS,
    assert_same_state,
    fit,
    small_model,
    state_of,
    step_directories,
    step_model,
    step_numbers,
)

import stepsave
from stepsave import BackupAndRestore
from stepsave.cli.copying import copy

pytestmark = pytest.mark.first


def test_a_fit_leaves_the_last_ones_and_the_first_of_each_so_many_batches(backup_dir):
    callback = BackupAndRestore(backup_dir, 2, delete_checkpoint=False, keep=2, keep_every=5)
    fit(step_model(), callback, epochs=3)
    assert step_directories(backup_dir) == [6, 10, 16, 18, 20]
    for step in step_directories(backup_dir):
        backup = stepsave.restore(backup_dir, step=step)
        assert backup.metadata["position"]["global_step"] == step
        weights = keras.tree.flatten(backup.state["trainable_variables"])
        assert weights
        assert {float(n) for array in weights for n in np.unique(array)} == {step}


def test_stock_keras_loads_the_newest(backup_dir):
    model = step_model()
    fit(model, BackupAndRestore(backup_dir, delete_checkpoint=False, keep=3), epochs=3)
    assert step_directories(backup_dir) == [STEPS, 2 * STEPS, 3 * STEPS]
    again = step_model()
    again.load_weights(backup_dir)
    assert step_numbers(again) == {3.0 * STEPS}


def test_a_training_that_goes_back_ends_like_one_that_was_not_ahead(backup_dir, tmp_path):
    keras.utils.set_random_seed(5)
    model = small_model(optimizer="adam")
    fit(model, BackupAndRestore(backup_dir, 3, delete_checkpoint=False, keep=5), epochs=3)
    expected = state_of(model)
    copy(f"{backup_dir}@9", str(tmp_path / "back"), everything=False, overwrite=False)
    again = small_model(optimizer="adam")
    fit(again, BackupAndRestore(tmp_path / "back", 3, delete_checkpoint=False), epochs=3)
    assert_same_state(state_of(again), expected)
    assert step_directories(backup_dir)[-1] == 21  # what it went back from is as it was


def test_all_of_them_go_with_the_end_of_the_fit(backup_dir):
    fit(step_model(), BackupAndRestore(backup_dir, 2, keep=3), epochs=2)
    assert not backup_dir.exists()


def test_what_is_to_stay_for_good_must_not_be_deleted(backup_dir):
    with pytest.raises(ValueError, match=r"`keep_every`.*`delete_checkpoint=False` to keep them"):
        BackupAndRestore(backup_dir, keep_every=100)
    with pytest.raises(ValueError, match="Invalid value for argument `keep`"):
        BackupAndRestore(backup_dir, keep=-1)
