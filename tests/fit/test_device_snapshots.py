"""`snapshot="device"` in `fit`, with the CPU as the device."""

import importlib

import pytest
from keras_support import (
    BACKEND,
    X_INT,
    Interrupt,
    assert_same_state,
    fit,
    fit_interrupted,
    leave,
    restored,
    rich_model,
    step_model,
    step_numbers,
)

from stepsave import BackupAndRestore


def test_a_new_model_gets_every_variable_back(backup_dir):
    callback = BackupAndRestore(backup_dir, 5, snapshot="device")
    interrupt = Interrupt(step=15)
    fit_interrupted(rich_model("adam"), callback, interrupt, x=X_INT, epochs=3)
    assert callback._saver._capture._stager is not None
    leave(callback)
    again = rich_model("adam")
    assert_same_state(restored(again, backup_dir).state, interrupt.state)


@pytest.mark.parametrize("every", [1, 3])
def test_a_backup_is_of_one_step_though_training_goes_on(backup_dir, every):
    """All variables of this model equal the number of the step: a mixture of two shows."""
    for step in (4, 6):
        callback = BackupAndRestore(backup_dir, every, snapshot="device", delete_checkpoint=False)
        model = step_model(width=200_000)
        fit_interrupted(model, callback, Interrupt(step=step), epochs=4)
        callback._saver.drain()
        saved = callback._saver.committed.step
        leave(callback)
        again = step_model(width=200_000)
        restored(again, backup_dir)
        assert step_numbers(again) == {float(saved)}


def test_what_is_compiled_before_the_first_step_is_what_saves_use(backup_dir, monkeypatch):
    module = importlib.import_module(f"stepsave.snapshot.{BACKEND}")
    prepared = []
    real = module._Stage.prepare

    def prepare(self, leaves):
        prepared.append(len(leaves))
        real(self, leaves)

    monkeypatch.setattr(module._Stage, "prepare", prepare)
    fit(rich_model("adam"), BackupAndRestore(backup_dir, 2, snapshot="device"), x=X_INT, epochs=2)
    metrics_made_late = BACKEND == "tensorflow"
    assert len(prepared) == 1 + metrics_made_late
