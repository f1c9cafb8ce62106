"""Corrupt backups, exceptions, and killed processes."""

import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from keras_support import (
    STEPS,
    Child,
    Interrupt,
    child_environment,
    files_below,
    fit,
    fit_interrupted,
    leave,
    restored,
    step_directories,
    step_model,
    step_numbers,
)

import stepsave

pytestmark = pytest.mark.once


@pytest.fixture(scope="module", params=[False, True], ids=["single", "double"])
def made(request, tmp_path_factory):
    """A backup of step 6, with `double_checkpoint` one of step 3 too; and that option."""
    backup_dir = tmp_path_factory.mktemp("made") / "backup"
    callback = stepsave.BackupAndRestore(backup_dir, 3, double_checkpoint=request.param)
    fit_interrupted(step_model(), callback, Interrupt(step=6))
    paths = [callback._weights_path, callback._training_metadata_path]
    paths += [callback._prev_weights_path, callback._prev_training_metadata_path]
    leave(callback)
    return backup_dir, request.param, paths


def overwrite(path):
    path.write_text("0")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_by_link(path):
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


DAMAGE = [
    ("COMMIT", overwrite),
    ("COMMIT", truncate),
    ("COMMIT", empty),
    ("COMMIT", flip),
    ("6/training.json", overwrite),
    ("6/training.json", empty),
    ("6/training.json", remove),
    ("6/layout.json", flip),
    ("6/layout.json", truncate),
    ("6/pytree/d/c/0", truncate),
    ("6/pytree/d/c/0", remove),
    ("6/pytree/d/c/0", replace_by_link),
    ("6/pytree/manifest.ocdbt", overwrite),
    ("6/pytree", remove),
    ("6", remove),
]
DAMAGE_IDS = [f"{damage.__name__}-{path}" for path, damage in DAMAGE]


@pytest.mark.parametrize(("path", "damage"), DAMAGE, ids=DAMAGE_IDS)
def test_a_damaged_backup_is_refused_or_the_one_before_it_restored(made, path, damage, tmp_path):
    source, double, _ = made
    backup_dir = tmp_path / "backup"
    shutil.copytree(source, backup_dir)
    damage(backup_dir / path)
    files = files_below(backup_dir)
    model, probe = step_model(), Interrupt(train_begin=True)
    callback = stepsave.BackupAndRestore(backup_dir, double_checkpoint=double)
    if double:
        with pytest.warns(UserWarning, match="cannot be read.*of step 3"):
            fit_interrupted(model, callback, probe)
        assert step_numbers(model) == {3}
    else:
        with pytest.raises((stepsave.CorruptBackupError, stepsave.BackupDirectoryError)) as caught:
            fit(model, callback, probe)
        assert str(backup_dir) in str(caught.value)
        assert step_numbers(model) == {0}
    if callback._saver is not None:
        leave(callback)
    assert files_below(backup_dir) == files


@pytest.mark.parametrize("made", [True], indirect=True)
def test_training_goes_on_from_the_backup_before_and_saves_again(made, tmp_path):
    backup_dir = tmp_path / "backup"
    shutil.copytree(made[0], backup_dir)
    flip(backup_dir / "6" / "training.json")
    callback = stepsave.BackupAndRestore(
        backup_dir, double_checkpoint=True, delete_checkpoint=False
    )
    model = step_model()
    with pytest.warns(UserWarning, match="3 steps of training are lost"):
        fit(model, callback, epochs=1)
    assert step_numbers(model) == {STEPS}
    again = step_model()
    restored(again, backup_dir, double_checkpoint=True)
    assert step_numbers(again) == {STEPS}


@pytest.mark.parametrize("made", [True], indirect=True)
def test_two_damaged_backups_are_refused_and_kept(made, tmp_path):
    backup_dir = tmp_path / "backup"
    shutil.copytree(made[0], backup_dir)
    flip(backup_dir / "6" / "training.json")
    flip(backup_dir / "3" / "layout.json")
    files = files_below(backup_dir)
    callback = stepsave.BackupAndRestore(backup_dir, double_checkpoint=True)
    with pytest.raises(stepsave.CorruptBackupError, match=r"training\.json"):
        fit(step_model(), callback)
    leave(callback)
    assert files_below(backup_dir) == files


@pytest.mark.parametrize("made", [True], indirect=True)
@pytest.mark.parametrize("number", [0, 1])
def test_the_paths_that_keras_tests_damage_make_a_backup_unreadable(made, number, tmp_path):
    # `_weights_path` and `_training_metadata_path` are of the newest backup, `_prev_…` of
    # the one before: with both damaged there is none.
    source, _, paths = made
    backup_dir = tmp_path / "backup"
    shutil.copytree(source, backup_dir)
    newest, before = (
        backup_dir / path.removeprefix(f"{source}/") for path in (paths[number], paths[number + 2])
    )
    overwrite(newest)
    with pytest.warns(UserWarning, match="of step 3"):
        restored(step_model(), backup_dir, double_checkpoint=True)
    overwrite(before)
    callback = stepsave.BackupAndRestore(backup_dir, double_checkpoint=True)
    with pytest.raises(stepsave.CorruptBackupError):
        fit(step_model(), callback)
    leave(callback)


# Exceptions and kills.

_SLOW_DISK = """
import time
from keras_support import *
from stepsave.engine.commit import CommitProtocol

begin = CommitProtocol.begin
def begin_slowly(self, *request):
    time.sleep(0.7)
    return begin(self, *request)
CommitProtocol.begin = begin_slowly
"""

_RAISING = f"""{_SLOW_DISK}
import sys
callback = stepsave.BackupAndRestore(sys.argv[1], 5)
fit(step_model(), callback, Interrupt(step=5), epochs=3)
"""


def test_a_save_in_flight_is_finished_when_fit_raises_and_the_process_ends(backup_dir):
    _, err = Child(_RAISING, backup_dir).wait(returncode=1)
    lines = err.strip().splitlines()
    assert lines[-1].endswith("InterruptionError: interrupted by the test")
    assert err.count("Traceback") == 1
    model = step_model()
    probe = restored(model, backup_dir)
    assert step_numbers(model) == {5}
    assert probe.initial_epoch in (None, 0)


_TRAINING = """
import sys, time
from keras_support import *

class Tell(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        print("begin", callback._progress.global_step, flush=True)
        time.sleep(0.02)

callback = stepsave.BackupAndRestore(sys.argv[1], 2)
fit(step_model(width=20_000), callback, Tell(), epochs=1000)
"""


def test_a_killed_training_goes_on_from_its_last_committed_step(backup_dir):
    child = subprocess.Popen(
        [sys.executable, "-c", _TRAINING, str(backup_dir)],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    reached = 0
    for line in child.stdout:
        if found := re.match(r"begin (\d+)", line):
            reached = int(found[1])
        if reached >= 3 * STEPS + 4:  # in the middle of an epoch
            break
    child.send_signal(signal.SIGKILL)
    reached = max([reached, *map(int, re.findall(r"begin (\d+)", child.stdout.read()))])
    assert child.wait(30) == -signal.SIGKILL
    child.stdout.close()
    # At most the two saves that the arenas hold were under way.
    model = step_model(width=20_000)
    probe = restored(model, backup_dir)
    (step,) = step_numbers(model)
    assert reached - 7 <= step <= reached + 1
    assert step % 2 == 0
    # Of a step at the end of an epoch the epoch is not over: no callback was told.
    assert probe.initial_epoch == (step - 1) // STEPS
    history = fit(model, stepsave.BackupAndRestore(backup_dir, 2), epochs=probe.initial_epoch + 2)
    assert history.epoch == [probe.initial_epoch, probe.initial_epoch + 1]
    assert step_numbers(model) == {(probe.initial_epoch + 2) * STEPS}
    assert not backup_dir.exists()


def test_a_directory_in_use_by_a_live_process_is_refused(backup_dir):
    child = subprocess.Popen(
        [sys.executable, "-c", _LOCKING, str(backup_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "locked\n"
        model = step_model()
        with pytest.raises(stepsave.DirectoryBusyError, match=f"pid {child.pid}"):
            fit(model, stepsave.BackupAndRestore(backup_dir))
        assert step_numbers(model) == {0}
    finally:
        child.kill()
        child.wait(30)
        child.stdin.close()
        child.stdout.close()
    fit(model, stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False))
    assert step_directories(backup_dir) == [STEPS]


_LOCKING = """
import sys, stepsave
saver = stepsave.Checkpointer(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


def test_saves_of_an_interrupted_fit_end_by_themselves(backup_dir):
    callback = stepsave.BackupAndRestore(backup_dir, 5)
    fit_interrupted(step_model(), callback, Interrupt(step=5))
    deadline = time.monotonic() + 30
    while not (backup_dir / "COMMIT").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert callback._saver.committed.step == 5
    leave(callback)
