"""A restore that takes long says how far it is; nothing else does."""

import logging
import sys

import keras
import pytest
from engine_support import flip_bit
from keras_support import (
    Interrupt,
    assert_same_state,
    fit,
    fit_interrupted,
    leave,
    restored,
    small_model,
)

from stepsave import BackupAndRestore
from stepsave.fit import restore_progress

pytestmark = pytest.mark.once


@pytest.fixture
def interrupted(tmp_path):
    """A directory with the backups of steps 7 and 14."""
    directory = str(tmp_path / "backup")
    callback = BackupAndRestore(directory, double_checkpoint=True)
    interrupt = Interrupt(epoch_begin=2)
    fit_interrupted(small_model(), callback, interrupt, epochs=3)
    leave(callback)
    return directory


@pytest.fixture
def _slow(monkeypatch):
    monkeypatch.setattr(restore_progress, "_SHOWN_AFTER_S", -1.0)


@pytest.fixture
def _interactive():
    keras.config.enable_interactive_logging()
    yield
    keras.config.disable_interactive_logging()


def resume(directory, **options):
    fit(small_model(), BackupAndRestore(directory, save_freq=1000, **options), epochs=3)


@pytest.mark.usefixtures("_slow", "_interactive")
def test_a_long_restore_writes_one_line_as_keras_does_before_it_says_what_it_restored(
    interrupted, capsys
):
    resume(interrupted, verbose=1)
    told = capsys.readouterr().out
    shown, restored = told.split("\n\n")
    assert restored == "Restored backup of step 14: going on at epoch 3\n"
    assert "\n" not in shown
    assert shown.startswith("\r")
    assert "0/1" in shown
    assert shown.rstrip().endswith("/MB restored")


@pytest.mark.usefixtures("_interactive")
def test_a_short_one_shows_nothing(interrupted, capsys):
    resume(interrupted, verbose=1)
    assert capsys.readouterr().out == "\nRestored backup of step 14: going on at epoch 3\n"


@pytest.mark.usefixtures("_slow", "_interactive")
def test_without_verbose_nothing_is_shown(interrupted, capfd):
    resume(interrupted)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("_slow")
def test_where_keras_is_to_write_nothing_live_it_is_one_log_line(interrupted, capfd, caplog):
    caplog.set_level(logging.INFO, "stepsave")
    resume(interrupted, verbose=1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("Read 0 MB of a backup in 0.")
    assert lines[1:] == ["Restored backup of step 14: going on at epoch 3"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("_slow", "_interactive")
def test_a_restore_that_begins_anew_with_another_backup_has_another_line(interrupted, capsys):
    flip_bit(f"{interrupted}/14/pytree/d/c/0", 3)
    with pytest.warns(UserWarning, match="7 steps of training are lost"):
        resume(interrupted, verbose=1)
    *lines, _, restored, _ = capsys.readouterr().out.split("\n")
    assert restored.startswith("Restored backup of step 7")
    assert len(lines) == 2
    assert all("MB restored" in line for line in lines)


class Gone:
    """What standard output is when its terminal is gone."""

    def write(self, text):
        if "restored" in text:
            raise BrokenPipeError(32, "Broken pipe")
        return len(text)

    def flush(self):
        pass


@pytest.mark.usefixtures("_slow", "_interactive")
def test_a_terminal_that_is_gone_costs_no_backup(backup_dir, monkeypatch, recwarn):
    callback, interrupt = BackupAndRestore(backup_dir, double_checkpoint=True), Interrupt(step=14)
    fit_interrupted(small_model(), callback, interrupt, epochs=3)
    leave(callback)
    monkeypatch.setattr(sys, "stdout", Gone())
    probe = restored(small_model(), backup_dir, double_checkpoint=True, verbose=1)
    assert_same_state(probe.state, interrupt.state, metrics=False)
    assert not [w for w in recwarn if "cannot be read" in str(w.message)], "the newest it was"
