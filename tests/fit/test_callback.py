# ruff: noqa: ARG002  callbacks have Keras's signatures
import contextlib
import inspect
import os
import resource
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from keras_support import (
    DISPATCHES_ASYNC,
    STEPS,
    Child,
    Interrupt,
    InterruptionError,
    Synchronous,
    X,
    Y,
    assert_same_state,
    files_below,
    fit,
    fit_interrupted,
    leave,
    restored,
    several_steps_per_call,
    small_model,
    state_of,
    step_directories,
    step_model,
    step_numbers,
)

import stepsave
from stepsave import BackupAndRestore

pytestmark = pytest.mark.first

# The constructor.


def test_the_signature_is_that_of_the_readme():
    parameters = list(inspect.signature(BackupAndRestore).parameters.values())
    assert [(p.name, p.default) for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == [
        ("backup_dir", inspect.Parameter.empty),
        ("save_freq", "epoch"),
        ("delete_checkpoint", True),
    ]
    assert {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY} == {
        "max_overhead": 0.01,
        "mtbf_s": None,
        "double_checkpoint": False,
        "keep": 0,
        "keep_every": None,
        "resume": "batch",
        "history": "new",
        "save_before_preemption": False,
        "preemption_signals": ("SIGTERM",),
        "grace_period_s": None,
        "when_busy": "wait",
        "snapshot": "auto",
        "writer_threads": None,
        "local_dir": None,
        "upload_every": 1,
        "log_metrics": False,
        "verbose": 0,
    }
    assert issubclass(BackupAndRestore, keras.callbacks.Callback)


@pytest.mark.parametrize("save_freq", ["batch", 0.15, True, 0, -1, None, "", 2.0])
def test_an_invalid_save_freq_is_refused(save_freq, backup_dir):
    text = f"Invalid value for argument `save_freq`. Received: save_freq={save_freq}"
    with pytest.raises(ValueError, match="Invalid value") as caught:
        BackupAndRestore(backup_dir, save_freq)
    assert text in str(caught.value)
    assert not backup_dir.exists()


def test_save_freq_false_is_refused_and_the_text_says_why(backup_dir):
    with pytest.raises(ValueError, match=r"Invalid value .* save_freq=False.*preemption"):
        BackupAndRestore(backup_dir, save_freq=False)


@pytest.mark.parametrize("save_freq", ["epoch", 1, 10**9, np.int64(3)])
def test_a_valid_save_freq_is_taken(save_freq, backup_dir):
    assert BackupAndRestore(backup_dir, save_freq).save_freq == save_freq


@pytest.mark.parametrize("nothing", ["", None])
def test_an_empty_backup_dir_is_refused(nothing):
    with pytest.raises(ValueError, match="Empty `backup_dir` argument passed"):
        BackupAndRestore(nothing)


@pytest.mark.parametrize("convert", [str, Path, os.DirEntry], ids=["str", "Path", "DirEntry"])
def test_backup_dir_may_be_a_path_of_any_kind(convert, backup_dir):
    backup_dir.mkdir()
    if convert is os.DirEntry:
        (path,) = os.scandir(backup_dir.parent)
    else:
        path = convert(backup_dir)
    fit(small_model(), BackupAndRestore(path, delete_checkpoint=False))
    assert step_directories(backup_dir) == [STEPS]


def test_an_unknown_when_busy_is_refused(backup_dir):
    with pytest.raises(ValueError, match=r"`when_busy`. Received: when_busy='maybe'.*'skip'"):
        BackupAndRestore(backup_dir, when_busy="maybe")


def test_the_constructor_leaves_the_disk_alone(backup_dir):
    assert BackupAndRestore(backup_dir).stats() is None
    assert not backup_dir.exists()


# When it saves.

EVERY_THIRD = [
    (3, 0, 3, 3),
    (6, 0, 6, 6),
    (9, 1, 2, 9),
    (12, 1, 5, 12),
    (15, 2, 1, 15),
    (18, 2, 4, 18),
    (21, 2, 7, 21),
]


def test_a_validation_finds_the_device_memory_of_the_copy_free(backup_dir):
    stages = []

    class Look(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            stages.append(callback._saver._capture._stager._stage)
            assert not any(getattr(stages[-1], name, None) for name in ("_copies", "_clones"))

    callback = BackupAndRestore(backup_dir, STEPS, snapshot="device", delete_checkpoint=False)
    model = small_model()
    fit(model, callback, Look(), epochs=2, validation_data=(X, Y))
    assert stages
    assert callback.stats().committed == 2
    found = restored(small_model(), backup_dir)
    assert_same_state(found.state, state_of(model), metrics=False)  # validation has used these


@pytest.mark.parametrize("others", [[], [Synchronous]], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("validation", [None, (X, Y)], ids=["", "validation"])
def test_batches_are_counted_across_epochs(others, validation, backup_dir, saves):
    callback = BackupAndRestore(backup_dir, 3)
    callbacks = [callback, *(other() for other in others)]
    fit(small_model(), *callbacks, epochs=3, validation_data=validation)
    assert saves == EVERY_THIRD
    assert callback.stats().started == callback.stats().committed == len(EVERY_THIRD)


@several_steps_per_call
@pytest.mark.parametrize("others", [[], [Synchronous]], ids=["asynchronous", "synchronous"])
def test_batches_are_counted_exactly_with_several_steps_per_call(others, backup_dir, saves):
    model = step_model(steps_per_execution=2)  # calls end after batches 2, 4, 6 and 7
    fit(model, BackupAndRestore(backup_dir, 3), *(other() for other in others), epochs=3)
    assert step_numbers(model) == {3 * STEPS}
    steps = [step for step, _, _, _ in saves]
    assert [iterations for *_, iterations in saves] == steps
    assert steps == [4, 6, 9, 13, 16, 18, 21]
    assert [batch for _, _, batch, _ in saves] == [4, 6, 2, 6, 2, 4, 7]


def test_by_default_it_saves_when_an_epoch_ends(backup_dir, saves):
    fit(small_model(), BackupAndRestore(backup_dir), epochs=3)
    assert saves == [(7, 1, 0, 7), (14, 2, 0, 14), (21, 3, 0, 21)]


def test_an_interval_longer_than_the_training_saves_nothing(backup_dir, saves):
    fit(small_model(), BackupAndRestore(backup_dir, 100), epochs=2)
    assert saves == []


def test_a_data_set_of_unknown_length_is_counted_too(backup_dir, saves):
    def batches():
        for _ in range(6):
            yield X[:4], Y[:4]

    callback = BackupAndRestore(backup_dir, 3)
    # This warning is Keras's way to say that a data set of unknown length has ended.
    with pytest.warns(UserWarning, match="ran out of data"):
        small_model().fit(batches(), shuffle=False, callbacks=[callback], verbose=0)
    assert saves == [(3, 0, 3, 3), (6, 0, 6, 6)]


def test_an_epoch_is_as_long_as_steps_per_epoch_says(backup_dir, saves):
    def batches():
        while True:
            yield X[:4], Y[:4]

    callback = BackupAndRestore(backup_dir, 3)
    small_model().fit(
        batches(), shuffle=False, steps_per_epoch=5, epochs=2, callbacks=[callback], verbose=0
    )
    assert saves == [(3, 0, 3, 3), (6, 1, 1, 6), (9, 1, 4, 9)]


def test_the_last_batch_of_an_epoch_is_saved_before_validation(backup_dir, saves):
    class Failing(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            raise InterruptionError

    callback = BackupAndRestore(backup_dir, STEPS)
    fit_interrupted(small_model(), callback, Failing(), validation_data=(X, Y))
    assert saves == [(7, 0, 7, 7)]


def test_a_stopped_epoch_is_counted_by_its_real_batches(backup_dir, saves):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self._model.stop_training = batch == 3

    fit(small_model(), BackupAndRestore(backup_dir, delete_checkpoint=False), Stop(), epochs=3)
    assert saves == [(4, 1, 0, 4)]


def test_ends_told_out_of_order_do_not_lose_a_batch(backup_dir):
    # Keras's dispatch threads may call `on_train_batch_end` concurrently and unordered.
    callback = BackupAndRestore(backup_dir, 100)
    in_addition, go_on = threading.Event(), threading.Event()

    class SlowBatch(int):
        def __add__(self, other):
            in_addition.set()
            assert go_on.wait(10)
            return int(self) + other

    late = threading.Thread(target=callback.on_train_batch_end, args=[SlowBatch(5)])
    late.start()
    assert in_addition.wait(10)
    last = threading.Thread(target=callback.on_train_batch_end, args=[6])
    last.start()
    last.join(1)  # it may wait for the other if there is a lock
    go_on.set()
    last.join()
    late.join()
    assert callback._progress.told_ended == STEPS


# Asynchronous dispatch.


def test_the_callback_leaves_dispatch_asynchronous(backup_dir):
    mine = keras.callbacks.CallbackList([BackupAndRestore(backup_dir, 1)])
    assert mine._async_train is DISPATCHES_ASYNC
    keras_own = keras.callbacks.CallbackList([keras.callbacks.BackupAndRestore(backup_dir)])
    assert keras_own._async_train is False


def test_snapshots_are_taken_by_the_thread_of_fit(backup_dir, saves, monkeypatch):
    ended_by, saved_by = set(), set()
    original = BackupAndRestore._save

    def save(self, *args):
        saved_by.add(threading.get_ident())
        original(self, *args)

    class Watch(keras.callbacks.Callback):
        async_safe = True

        def on_train_batch_end(self, batch, logs=None):
            ended_by.add(threading.get_ident())

    monkeypatch.setattr(BackupAndRestore, "_save", save)
    fit(small_model(), BackupAndRestore(backup_dir, 1), Watch(), epochs=2)
    assert saved_by == {threading.get_ident()}
    assert (threading.get_ident() not in ended_by) is DISPATCHES_ASYNC
    assert len(saves) == 2 * STEPS


# The end of a training.


def test_a_completed_fit_removes_the_backup_and_its_directory(backup_dir):
    fit(small_model(), BackupAndRestore(backup_dir, 2), epochs=2)
    assert not backup_dir.exists()


def test_delete_checkpoint_false_keeps_the_last_backup(backup_dir):
    model = small_model()
    probe = Interrupt()
    fit(model, BackupAndRestore(backup_dir, 7, delete_checkpoint=False), probe, epochs=2)
    assert step_directories(backup_dir) == [14]
    found = restored(small_model(), backup_dir)
    assert found.initial_epoch == 1  # whose batches are all done, and which was not told to end
    assert_same_state(found.state, state_of(model))


def test_a_foreign_file_that_came_later_survives_with_the_directory(backup_dir):
    class Drop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            (backup_dir / "notes.txt").write_text("mine")

    fit(small_model(), BackupAndRestore(backup_dir, 2), Drop())
    assert [path.name for path in backup_dir.iterdir()] == ["notes.txt"]
    assert (backup_dir / "notes.txt").read_text() == "mine"


def test_a_foreign_directory_is_refused_before_training(backup_dir):
    backup_dir.mkdir()
    (backup_dir / "notes.txt").write_text("mine")
    model = small_model()
    before = model.get_weights()
    with pytest.raises(stepsave.BackupDirectoryError, match="notes"):
        fit(model, BackupAndRestore(backup_dir))
    assert files_below(backup_dir) == {"notes.txt": b"mine"}
    np.testing.assert_equal(model.get_weights(), before)


def test_a_directory_of_keras_own_callback_is_refused(backup_dir):
    model = small_model()
    theirs = keras.callbacks.BackupAndRestore(str(backup_dir), delete_checkpoint=False)
    fit(model, theirs)
    found = files_below(backup_dir)
    with pytest.raises(stepsave.BackupDirectoryError):
        fit(model, BackupAndRestore(backup_dir))
    assert files_below(backup_dir) == found


# Saves that fail.


class SmallDisk(keras.callbacks.Callback):
    """From one batch on, when the saves before it are durable, files end at 16 KiB."""

    def __init__(self, callback, batch, epoch=0):
        super().__init__()
        self.callback = callback
        self.when = (epoch, batch)
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.when:
            self.callback._saver.drain()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))


@contextlib.contextmanager
def whole_disk_afterwards():
    """Puts the limit back inside the test: it binds pytest's own output too, if that is a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_save_raises_at_a_later_hook_and_the_old_backup_stays(backup_dir):
    model = step_model(width=4096)
    callback = BackupAndRestore(backup_dir, 3)
    with whole_disk_afterwards():
        with pytest.raises(stepsave.SaveFailedError, match="step 6 failed"):
            fit(model, callback, SmallDisk(callback, batch=5), epochs=100)
        with contextlib.suppress(stepsave.SaveFailedError):  # step 9 may have been under way
            leave(callback)
    model = step_model(width=4096)
    restored(model, backup_dir)
    assert step_numbers(model) == {3}


def test_a_failure_of_the_last_save_raises_at_the_end_and_keeps_the_data(backup_dir):
    callback = BackupAndRestore(backup_dir)  # epochs end at steps 7 and 14
    with (
        whole_disk_afterwards(),
        pytest.raises(stepsave.SaveFailedError, match="step 14 failed"),
    ):
        fit(step_model(width=4096), callback, SmallDisk(callback, 6, 1), epochs=2)
    assert callback.stats().failed == 1
    model = step_model(width=4096)
    probe = restored(model, backup_dir)
    assert step_numbers(model) == {7}
    assert probe.initial_epoch == 1


def test_a_busy_disk_is_waited_for_or_the_save_skipped(backup_dir, monkeypatch):
    from stepsave.engine.commit import CommitProtocol

    gate = threading.Event()
    original = CommitProtocol.begin

    def begin(self, *request):
        assert gate.wait(60)
        return original(self, *request)

    class OpenLater(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            gate.set()

    monkeypatch.setattr(CommitProtocol, "begin", begin)
    callback = BackupAndRestore(backup_dir, 1, delete_checkpoint=False, when_busy="skip")
    fit(step_model(), OpenLater(), callback)
    # The last save of the epoch is due in `on_epoch_end` after the gate was opened.
    assert callback.stats().skipped >= STEPS - 3
    assert callback.stats().started + callback.stats().skipped == STEPS
    model = step_model()
    restored(model, backup_dir)
    assert step_numbers(model) <= {2.0, 7.0}


# What it says.


@pytest.fixture
def _interactive():
    keras.config.enable_interactive_logging()
    yield
    keras.config.disable_interactive_logging()


@pytest.mark.usefixtures("_interactive")
def test_verbose_prints_a_line_per_save_and_restore(backup_dir, capsys):
    callback = BackupAndRestore(backup_dir, verbose=1)
    fit_interrupted(small_model(), callback, Interrupt(epoch_begin=2), epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        f"Epoch 1: saving backup of step 7 to {backup_dir}",
        f"Epoch 2: saving backup of step 14 to {backup_dir}",
    ]
    leave(callback)
    callback = BackupAndRestore(backup_dir, verbose=1)
    fit(small_model(), callback, epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "Restored backup of step 14: going on at epoch 3",
        f"Epoch 3: saving backup of step 21 to {backup_dir}",
        *str(callback.report()).splitlines(),
    ]


@pytest.mark.usefixtures("_interactive")
def test_by_default_it_prints_nothing(backup_dir, capfd):
    callback = BackupAndRestore(backup_dir, 2)
    fit_interrupted(small_model(), callback, Interrupt(epoch_begin=2), epochs=3)
    leave(callback)
    fit(small_model(), BackupAndRestore(backup_dir, 2), epochs=3)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# Data loaded by other processes.

_WITH_WORKERS = """
import sys
import keras, stepsave
from keras_support import *

class Data(keras.utils.PyDataset):
    def __len__(self):
        return STEPS
    def __getitem__(self, i):
        return X[i * BATCH : (i + 1) * BATCH], Y[i * BATCH : (i + 1) * BATCH]

if __name__ == "__main__":
    model = step_model()
    data = Data(workers=2, use_multiprocessing=True, max_queue_size=4)
    callback = stepsave.BackupAndRestore(sys.argv[1], 2, delete_checkpoint=False)
    model.fit(data, epochs=3, callbacks=[callback], verbose=0)
    print(callback.stats().committed, sorted(step_numbers(model)))
"""


def test_worker_processes_neither_hang_nor_take_the_lock(backup_dir, tmp_path):
    # From a file: worker processes may have to import the data set's module.
    script = tmp_path / "with_workers.py"
    script.write_text(_WITH_WORKERS)
    code = f"import runpy, sys; runpy.run_path({str(script)!r}, run_name='__main__')"
    out, _ = Child(code, backup_dir).wait(timeout=120)
    assert out.split("\n")[-2] == "10 [21.0]"
    model = step_model()
    restored(model, backup_dir)
    assert step_numbers(model) == {20}
