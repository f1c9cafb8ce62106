"""What the callback says of its saves: the same on every backend, however `fit` ends."""
# ruff: noqa: ARG002  callbacks have Keras's signatures

import collections
import copy
import csv
import json
import sys
import threading
import time

import keras
import numpy as np
import pytest
from bucket_support import memory
from keras_support import (
    STEPS,
    Interrupt,
    X,
    Y,
    assert_same_state,
    fit,
    fit_interrupted,
    restored,
    several_steps_per_call,
    small_model,
    state_of,
    step_model,
    step_numbers,
)

from stepsave import BackupAndRestore, SaveReport
from stepsave.engine.commit import CommitProtocol

__all__ = ("memory",)

KEYS = [  # as Keras sorts them
    "stepsave_backup_age_s",
    "stepsave_failed",
    "stepsave_saves",
    "stepsave_skipped",
    "stepsave_stall_s",
]


class Look(keras.callbacks.Callback):
    """Keeps the logs of each epoch as they are when its turn comes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(dict(logs))


def test_there_is_no_report_before_the_first_fit_and_copies_have_none(backup_dir):
    callback = BackupAndRestore(backup_dir, 3)
    assert callback.report() is None
    fit(small_model(), callback)
    assert callback.report() is not None
    assert copy.deepcopy(callback).report() is None


def test_the_report_of_a_fit_agrees_with_its_stats_and_has_each_step(backup_dir):
    callback = BackupAndRestore(backup_dir, 3, delete_checkpoint=False)
    model = small_model()
    fit(model, callback, epochs=3, validation_data=(X, Y))
    report = callback.report()
    assert report.stats == callback.stats()
    assert [save.step for save in report.saves] == [3, 6, 9, 12, 15, 18, 21]
    assert report.stats.committed == len(report.saves)
    for save in report.saves:
        assert save.outcome == "committed"
        assert 0 < save.began_s <= save.write_began_s <= save.write_ended_s <= save.ended_s
        assert save.ended_s <= report.elapsed_s
    steps = report.steps
    assert steps.count == len(steps.took_s) == 3 * STEPS
    assert list(steps.ended_s) == sorted(steps.ended_s)
    assert 0 < steps.total_s < steps.ended_s[-1] <= report.elapsed_s
    # A save is taken between the end of its step and that of the next one.
    for save in report.saves[:-1]:
        assert steps.ended_s[save.step - 1] <= save.began_s <= steps.ended_s[save.step]
    assert SaveReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    found = restored(small_model(), backup_dir)
    assert_same_state(found.state, state_of(model), metrics=False)  # validation has used these


def test_validation_between_steps_is_no_step(backup_dir):
    class Slow(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            time.sleep(0.5)

    callback = BackupAndRestore(backup_dir, 3)
    before_s = time.perf_counter()
    fit(small_model(), callback, Slow(), epochs=3, validation_data=(X, Y))
    took_s = time.perf_counter() - before_s
    assert callback.report().steps.total_s <= took_s - 1.5


@several_steps_per_call
def test_with_several_steps_per_call_a_call_is_timed(backup_dir):
    callback = BackupAndRestore(backup_dir, 3)
    fit(step_model(steps_per_execution=2), callback, epochs=3)
    assert callback.report().steps.count == 3 * -(-STEPS // 2)


def test_with_resume_by_epoch_steps_are_timed_too(backup_dir):
    callback = BackupAndRestore(backup_dir, 3, resume="epoch")
    fit(small_model(), callback, epochs=3, validation_data=(X, Y))
    assert callback.report().steps.count == 3 * STEPS


def test_a_step_reads_the_clock_once_and_says_nothing(backup_dir, monkeypatch):
    real, reads = time.perf_counter, collections.Counter()

    def count():
        frame = sys._getframe(1)
        if threading.current_thread() is threading.main_thread():
            reads[frame.f_globals["__name__"]] += 1
        return real()

    monkeypatch.setattr(time, "perf_counter", count)
    counts = []
    for epochs in (1, 3):
        reads.clear()
        callback = BackupAndRestore(backup_dir, 1000)
        fit(small_model(), callback, epochs=epochs)
        counts.append({k: n for k, n in reads.items() if k.startswith("stepsave")})
    monkeypatch.undo()
    once = {"stepsave.engine.step_times"}
    differing = {k for k in counts[1] if counts[1][k] != counts[0].get(k)}
    assert differing == once
    more = counts[1]["stepsave.engine.step_times"] - counts[0]["stepsave.engine.step_times"]
    assert more == 2 * (STEPS + 1)  # each step, and where an epoch begins


def test_a_report_can_be_had_during_fit_and_after_an_error_and_goes_on_in_neither(backup_dir):
    during = []

    class Ask(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            during.append(callback.report())

    callback = BackupAndRestore(backup_dir, 2)
    model = step_model()
    fit_interrupted(model, callback, Ask(), Interrupt(step=10), epochs=3)
    assert during[0].stats.started == 3
    callback._saver.drain()
    after = callback.report()
    assert (after.stats.committed, after.steps.count) == (5, 10)
    time.sleep(0.3)
    assert callback.report().elapsed_s == after.elapsed_s  # nobody trains any more
    again = BackupAndRestore(backup_dir, 2, delete_checkpoint=False)
    fit(model, again, epochs=3)
    report = again.report()
    # From batch 3 of the second epoch on; the first of them only starts the clock.
    assert report.steps.count == 2 * STEPS - 3 - 1
    assert [save.step for save in report.saves] == [12, 14, 16, 18, 20]
    model = step_model()
    restored(model, backup_dir)
    assert step_numbers(model) == {20}


def test_each_fit_has_a_report_of_its_own(backup_dir):
    callback = BackupAndRestore(backup_dir, 3)
    model = small_model()
    fit(model, callback, epochs=1)
    first = callback.report()
    fit(model, callback, epochs=2)
    second = callback.report()
    assert (first.stats.started, first.steps.count) == (2, STEPS)
    assert (second.stats.started, second.steps.count) == (4, 2 * STEPS)
    assert first.opened_at_s < second.opened_at_s


def test_verbose_tells_the_report_once_at_the_end_and_silence_nothing(backup_dir, capsys):
    keras.config.enable_interactive_logging()
    callback = BackupAndRestore(backup_dir, 3, verbose=1)
    fit(small_model(), callback, epochs=2)
    told = capsys.readouterr().out
    assert told.endswith(f"\n{callback.report()}\n")
    assert told.count("Backups: 4 saved, 0 skipped, 0 failed in") == 1
    assert len(str(callback.report()).splitlines()) < 10
    fit(small_model(), BackupAndRestore(backup_dir, 3), epochs=2)
    fit(small_model(), BackupAndRestore(backup_dir, 100, verbose=1))  # nothing to tell of
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
def test_metrics_are_in_the_history_and_in_the_logs_of_all_callbacks(first, backup_dir, tmp_path):
    callback = BackupAndRestore(backup_dir, 3, log_metrics=True)
    look, path = Look(), tmp_path / "log.csv"
    others = [look, keras.callbacks.CSVLogger(str(path))]
    callbacks = [callback, *others] if first else [*others, callback]
    model = small_model()
    history = fit(model, *callbacks, epochs=3, validation_data=(X, Y)).history
    assert set(history) == {"loss", "val_loss", *KEYS}
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for key in KEYS:
        assert [logs[key] for logs in look.seen] == history[key]
        assert [float(row[key]) for row in rows] == history[key]
    report = callback.report()
    assert sum(history["stepsave_saves"]) <= report.stats.committed == 7
    assert history["stepsave_skipped"] == history["stepsave_failed"] == [0, 0, 0]
    assert sum(history["stepsave_stall_s"]) == pytest.approx(report.stats.stall_total_s)
    assert all(0 < age_s <= report.worst_age_s for age_s in history["stepsave_backup_age_s"])
    assert {type(value) for value in look.seen[0].values()} == {float}


def test_with_a_bucket_behind_the_disk_the_age_there_is_logged_and_told(memory, tmp_path):
    callback = BackupAndRestore(memory.place, 3, local_dir=tmp_path / "local", log_metrics=True)
    look = Look()
    history = fit(small_model(), callback, look, epochs=3).history
    assert set(history) == {"loss", *KEYS, "stepsave_remote_age_s"}
    assert len(history["stepsave_remote_age_s"]) == 3
    assert all(0 < age_s < 300 for age_s in history["stepsave_remote_age_s"])
    report = callback.report()
    assert f"step {report.stats.remote_step}, " in str(report)
    assert report.stats.remote_step >= 3


def test_without_being_asked_logs_are_what_they_were(backup_dir):
    history = fit(small_model(), BackupAndRestore(backup_dir, 3), epochs=2).history
    assert set(history) == {"loss"}


def test_metrics_count_what_is_skipped_in_the_epoch(backup_dir, monkeypatch):
    gate = threading.Event()
    original = CommitProtocol.begin

    def begin(self, *request):
        assert gate.wait(60)
        return original(self, *request)

    class OpenLater(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            gate.set()
            callback._saver.drain()

    monkeypatch.setattr(CommitProtocol, "begin", begin)
    callback = BackupAndRestore(backup_dir, 1, when_busy="skip", log_metrics=True)
    history = fit(step_model(), OpenLater(), callback, epochs=2, validation_data=(X, Y)).history
    # Two are held, all others of the epoch have no buffer; these two end in the next one.
    assert history["stepsave_saves"][0] == 0
    assert history["stepsave_skipped"][0] == STEPS - 2
    assert history["stepsave_saves"][1] >= 2


def test_metrics_change_no_bit_of_what_is_trained_and_resumed(backup_dir):
    keras.utils.set_random_seed(3)
    whole = small_model()
    plain = fit(whole, epochs=3, shuffle=True).history
    keras.utils.set_random_seed(3)
    model = small_model()
    first = BackupAndRestore(backup_dir, 2, log_metrics=True, history="all")
    fit_interrupted(model, first, Interrupt(step=10), epochs=3, shuffle=True)
    keras.utils.set_random_seed(3)
    model = small_model()
    second = BackupAndRestore(backup_dir, 2, log_metrics=True, history="all")
    history = fit(model, second, epochs=3, shuffle=True).history
    assert_same_state(state_of(model), state_of(whole))
    assert history["loss"] == plain["loss"]
    assert set(history) == {"loss", *KEYS}
    # One value an epoch, those before the interruption as they were logged then.
    assert [len(history[key]) for key in KEYS] == [3] * len(KEYS)
    assert history["stepsave_saves"][1] <= 3  # of the epoch, since it went on


def test_two_callbacks_do_not_count_for_each_other(backup_dir, tmp_path):
    one = BackupAndRestore(backup_dir, 2, log_metrics=True)
    other = BackupAndRestore(tmp_path / "other", 3, log_metrics=True)
    history = fit(small_model(), one, other, epochs=2).history
    assert set(history) == {"loss", *KEYS}
    assert (one.report().stats.started, other.report().stats.started) == (7, 4)
    assert (one.report().steps.count, other.report().steps.count) == (2 * STEPS, 2 * STEPS)


def test_a_callback_list_that_is_used_again_has_each_figure_once(backup_dir):
    model = small_model()
    look = Look()
    callback = BackupAndRestore(backup_dir, 3, log_metrics=True)
    callbacks = keras.callbacks.CallbackList(
        [look, callback], add_history=True, model=model, epochs=1, steps=STEPS
    )
    for _ in range(3):
        model.fit(X, Y, batch_size=4, epochs=1, verbose=0, callbacks=callbacks)
    assert [list(logs) for logs in look.seen] == [["loss", *KEYS]] * 3


def test_the_picture_and_the_trace_of_a_fit_are_made(backup_dir, tmp_path):
    callback = BackupAndRestore(backup_dir, 3)
    fit(small_model(), callback, epochs=3)
    callback.report().plot(tmp_path / "report.png")
    callback.report().save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = collections.Counter(event["name"].partition(",")[0] for event in events)
    assert (names["step"], names["stall"], names["commit"]) == (3 * STEPS, 7, 7)
    steps = [e for e in events if e["name"] == "step"]
    for stall in (e for e in events if e["name"].startswith("stall") and "21" not in e["name"]):
        assert any(
            np.all(step["ts"] - 1 <= stall["ts"])
            and stall["ts"] + stall["dur"] <= step["ts"] + step["dur"] + 1
            for step in steps
        )
    assert (tmp_path / "report.png").stat().st_size > 10_000
