"""`BackupAndRestore` for `keras.Model.fit`."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras

from stepsave.engine.arguments import check_choices, check_threads
from stepsave.engine.checkpointer import Checkpointer, WhenBusy
from stepsave.engine.frequency import MAX_OVERHEAD, check_auto
from stepsave.engine.opening import Place
from stepsave.fit import keras_internals, open_directories
from stepsave.fit.companions import Companions, Start
from stepsave.fit.copies import FreshCopies
from stepsave.fit.keras_internals import RunningFit
from stepsave.fit.keras_names import KerasFiles
from stepsave.fit.loop import FitLoop, forget_interrupted
from stepsave.fit.phases import Phases
from stepsave.fit.preemption import PreemptionSignals, check_signals
from stepsave.fit.progress import Progress, check_save_freq, steps_of
from stepsave.fit.reporting import Reporting
from stepsave.fit.resuming import Resuming
from stepsave.fit.state import BeforeValidation, Cut, FitState, RestoredFit
from stepsave.format.records import BackupRecord
from stepsave.position import TrainingPosition
from stepsave.snapshot.staging import SnapshotMode
from stepsave.store.places import Target, name_of

__all__ = ("BackupAndRestore",)


class BackupAndRestore(Reporting, FreshCopies, KerasFiles, keras.callbacks.Callback):
    """Backs up the training state in the background and restores it after an interruption.

    A drop-in for `keras.callbacks.BackupAndRestore`. Training waits only until the state is
    copied into a host buffer; background threads write it and commit it, weights and
    position together. If training is interrupted, the same script, run again, goes on at the
    batch after the last committed backup, as if it had not been interrupted.

    Example:
        ```python
        backup = stepsave.BackupAndRestore("backup", save_freq=5)
        model.fit(x, y, epochs=10, callbacks=[backup])
        ```

    """

    # Asynchronous dispatch is not forbidden: what may run on another thread notes a number.
    async_safe = True

    def __init__(
        self,
        backup_dir: Target,
        save_freq: str | int = "epoch",
        delete_checkpoint: bool = True,
        *,
        max_overhead: float = MAX_OVERHEAD,
        mtbf_s: float | None = None,
        double_checkpoint: bool = False,
        keep: int = 0,
        keep_every: int | None = None,
        resume: Literal["batch", "epoch"] = "batch",
        history: Literal["new", "all"] = "new",
        save_before_preemption: bool = False,
        preemption_signals: Sequence[int | str] = ("SIGTERM",),
        grace_period_s: float | None = None,
        when_busy: WhenBusy = "wait",
        snapshot: SnapshotMode = "auto",
        writer_threads: int | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        upload_every: int | str = 1,
        log_metrics: bool = False,
        verbose: int = 0,
    ) -> None:
        """Makes the callback; the directory is opened when `fit` begins.

        Args:
            backup_dir: Directory for the backup, its own: nothing else may be in it. Or a bucket:
                `s3://bucket/prefix`, `gs://bucket/prefix`; see `Checkpointer`.
            save_freq: `"epoch"` to save when an epoch ends; a number of batches, which are counted
                exactly, across epochs and with `steps_per_execution`; a time, such as `"30s"` or
                `"5min"`; `"auto"` for as often as the disk and `max_overhead` allow. `False`,
                with `save_before_preemption`, to save only then.
            delete_checkpoint: Whether to remove all backups when `fit` has completed.
            max_overhead: With `"auto"`, the share of the time that saves may cost.
            mtbf_s: With `"auto"`, the mean time between failures, if known: then no more often than
                pays; see `SaveFrequency`.
            double_checkpoint: Whether to keep the backup before the newest too, to fall back to.
            keep: How many backups to keep before the newest, to go back to; see `Checkpointer`.
            keep_every: Of older ones, the first of each so many batches stays too, for good.
            resume: `"batch"` to go on at the batch after the backup, with data, random generators,
                metrics and callbacks as they were; `"epoch"` to repeat the epoch, as Keras does.
            history: What `fit` returns after a resume: the epochs that it ran (`"new"`), or those
                before the interruption too (`"all"`).
            save_before_preemption: Whether a signal ends `fit`: it finishes the step, saves,
                uploads if there are two tiers, and raises `Preempted`.
            preemption_signals: Which signals, by number or name.
            grace_period_s: From the signal until the process is killed, to warn of longer saves.
            when_busy: What a due save does while both host buffers are in use: `"wait"`, or
                `"skip"` it.
            snapshot: Where the state is copied first: `"device"`, `"host"`, or `"auto"`; see
                `Checkpointer`.
            writer_threads: Background threads that write; None for a default.
            local_dir: A directory of a fast disk, if `backup_dir` is a bucket: saves go there, and
                the newest goes up in the background. Restored is the newest all processes have.
            upload_every: How often: a number of saves, or a time, such as `"30s"`.
            log_metrics: Whether the logs of each epoch, and so the history and what other callbacks
                record, have the cost of saves too, as `stepsave_stall_s` and the like.
            verbose: 1 prints a line per save and restore, and a report at the end.

        Raises:
            ValueError: If an argument is invalid.
        """
        super().__init__()
        if not backup_dir:
            raise ValueError("Empty `backup_dir` argument passed")
        Place.of(backup_dir, local_dir, upload_every, read_only=False)  # what is wrong, says so now
        self._target, self.backup_dir = backup_dir, name_of(backup_dir)
        check_auto(save_freq, max_overhead, mtbf_s)
        self.save_freq = check_save_freq(save_freq, may_be_false=save_before_preemption)
        self.max_overhead, self.mtbf_s = max_overhead, mtbf_s
        self.delete_checkpoint = delete_checkpoint
        self.double_checkpoint = double_checkpoint
        open_directories.check_retention(keep, keep_every, deletes=delete_checkpoint)
        check_choices(resume=resume, history=history, when_busy=when_busy, snapshot=snapshot)
        self.resume = resume
        self.history = history
        self.save_before_preemption = save_before_preemption
        self.preemption_signals = check_signals(preemption_signals)
        self.grace_period_s = grace_period_s
        self._options = {
            "double_checkpoint": double_checkpoint, "keep": keep, "keep_every": keep_every,
            "when_busy": when_busy, "snapshot": snapshot,
            "writer_threads": None if writer_threads is None else check_threads(writer_threads),
            "local_dir": local_dir, "upload_every": upload_every,
        }  # fmt: skip
        self.log_metrics = log_metrics
        self.verbose = verbose
        self._begin_fresh()

    def _forget_fit(self) -> None:
        self._saver: Checkpointer | None = None
        self._close_at_exit: weakref.finalize[Any, Any] | None = None
        self._last_records: tuple[BackupRecord | None, BackupRecord | None] = (None, None)
        self._last_report = self._logged = None
        self._signals: PreemptionSignals | None = None
        self._reset()

    def _reset(self) -> None:
        # Keras's tests read them: epochs completed, and the index of the last batch in this one.
        self._current_epoch = 0
        self._last_batch_seen = 0
        self._fit_thread = threading.get_ident()
        self._loop: FitLoop | None = None
        self._state: FitState | None = None
        self._companions = Companions()
        self._phases: Phases | None = None
        self._start: Start | None = None
        self._restored: RestoredFit | None = None
        self._progress = Progress(self.save_freq, self.max_overhead, self.mtbf_s)
        self._in_epoch = False
        self._saved_step = 0
        self._end: Cut | None = None  # of the epoch's batches
        self._before_validation: BeforeValidation | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Restores the last committed backup, if there is one."""
        self._reset()
        model = self._trained_model()
        saver = self._open()
        fit = keras_internals.find_fit(model)
        forget_interrupted(model, fit, self)
        exact = self.resume == "batch"
        if fit is None and (exact or self.save_before_preemption):
            keras_internals.warn_of_unknown_fit()
        self._companions, self._phases = Companions.of(fit, self), Phases(self.backup_dir, model)
        if fit is not None and exact:
            self._loop = FitLoop.of(fit, model, self)
        self._log_first(fit)
        self._state = FitState(model, self._loop, self._phases, with_history=self.history == "all")
        resuming = Resuming(model, fit, self._loop, self._phases, (self.params or {}).get("epochs"))
        self._restored = resuming.begin(saver, self._companions, self, self._siblings)
        if self._restored is not None:
            self._tell(f"Restored backup of step {self._saved_step}: going on at {self._start}")
        if self._loop is not None:
            self._loop.warn_of_doubts()
        if keras_internals.is_built(model):
            self._state.prepare(saver)
        self._progress.begin_fit(saver, self._state.wait_computed)
        if fit is not None and self.save_before_preemption:
            self._expect_signals(fit, model)

    def after_train_begin(self) -> None:
        """Called when all callbacks have begun, and perhaps reset themselves."""
        if self._restored is not None and self._loop is not None:
            self._restored.put_back(self._siblings())
            if self.history == "all":
                self._restored.put_back_history(self._trained_model())

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Waits until everything is durable, and removes the backup if so asked.

        Raises:
            SaveFailedError: If a save failed; the backup is then kept.
        """
        keras_internals.set_initial_epoch(self._trained_model(), None)  # if no epoch was left
        if self._signals is not None:
            self._signals.remove()
        if self._loop is not None:
            self._loop.stop()
        self._progress.frequency.close()
        saver = self._saver
        if saver is None or saver.closed:
            return
        self._last_records = (saver.committed, saver.previous)
        keeps = self._start is not None and self._start.keeps_backup
        try:
            open_directories.close_directory(
                saver, self._close_at_exit, deletes=self.delete_checkpoint, keeps=keeps
            )
        finally:
            self._last_report = self.report()
        self._saver = None
        if self._phases is not None:
            self._phases.end()
        self._tell_report()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        # `fit` has read it. Left there, the next `fit` of this model would skip epochs.
        keras_internals.set_initial_epoch(self._trained_model(), None)
        self._progress.begin_epoch(epoch, steps_of(self.params))
        if self._start is not None:
            self._progress.go_on_at(self._start.batch)
        self._start = self._restored = None
        self._in_epoch = True
        self._end = None
        if self._state is not None:
            self._state.begin_epoch()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._log_metrics(logs)
        self._current_epoch = epoch + 1
        self._last_batch_seen = 0
        if self._loop is None:
            self.after_epoch_end(epoch)

    def after_epoch_end(self, epoch: int) -> None:
        """Called when all callbacks know that the epoch has ended; they have changed the rate."""
        # It may have been stopped within.
        self._progress.advance(self._progress.told_ended, timed=False)
        self._in_epoch = False
        if self.save_freq == "epoch" or self._progress.save_is_due:
            self._save(epoch + 1, 0)
        self._end_if_preempted(epoch + 1, 0)

    # With `resume="batch"` saves are made at cuts; otherwise as early as Keras's would.
    def at_cut(self, batches_done: int) -> None:
        """Called when so many batches of the epoch are done, and all callbacks know."""
        assert self._saver is not None
        self._saver.raise_failed(but_for_outages=True)
        self._last_batch_seen = batches_done - 1
        self._advance_and_save(batches_done)
        progress = self._progress
        if self._signals is not None:
            self._end_if_preempted(progress.epoch, progress.batches_done)
            if progress.batches_done == progress.steps and self._loop is not None:
                self._end = Cut.take(self._loop)

    def while_passing_over(self) -> None:
        """Called when a batch was read that was trained before the interruption."""
        self._end_if_preempted(self._progress.epoch, self._progress.batches_done)

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        # Called by the thread of `fit` between two steps: where to save with asynchronous dispatch.
        if self._loop is not None:
            return
        self._progress.begin_batch(batch)
        if self._saver is not None:
            self._saver.raise_failed(but_for_outages=True)
        if batch > self._progress.batches_done:
            self._last_batch_seen = batch - 1
            self._advance_and_save(batch)
        self._end_if_preempted(self._progress.epoch, self._progress.batches_done)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._progress.end_batch(batch)
        if self._loop is not None or threading.get_ident() != self._fit_thread:
            return  # dispatched asynchronously: the next step may already be running
        self._last_batch_seen = batch
        self._advance_and_save(batch + 1)

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        if not self._in_epoch:
            return
        # Validation inside `fit`: a save due after the last batch is made before it, so
        # that an interruption of the validation does not lose it.
        if self._loop is None:
            self._advance_and_save(self._progress.certainly_ended(self._trained_model()))
        elif self._signals is not None:
            # A callback may have ended the epoch within; then there was no cut.
            keras_internals.flush(self._loop.callbacks)
            self._progress.advance(self._progress.told_ended)
            # Where Keras learns the length by reading on, nothing was begun after the last batch.
            end = self._end or Cut.take(self._loop)
            self._before_validation = BeforeValidation.take(self._trained_model(), end)
        if self._saver is not None and not self._saver.closed:
            # It may need more than a step did, when it was decided that there is room for a copy.
            self._saver.free_device_memory()
            self._progress.frequency.pause()

    def on_test_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._in_epoch:
            self._end_if_preempted(self._progress.epoch, self._progress.batches_done)

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self._before_validation = None
        self._progress.frequency.go_on()

    def _advance_and_save(self, batches_done: int) -> None:
        self._progress.advance(batches_done)
        if self._progress.save_is_due:
            self._save(self._progress.epoch, self._progress.batches_done)

    def _save(self, epoch: int, batch: int) -> None:
        began_s = time.perf_counter()
        progress = self._progress
        progress.save_is_due = False
        saver, state = open_directories.check_kept(self._saver, self.backup_dir), self._state
        assert state is not None
        if progress.global_step <= self._saved_step:
            return  # an epoch without batches: this state is saved already
        position = TrainingPosition(progress.global_step, epoch, batch, progress.steps)
        before = self._before_validation
        metadata, paths, leaves = state.contents(saver, position, self._siblings(), before)
        handle = saver.save_leaves(position.global_step, paths, leaves, metadata, began_s=began_s)
        progress.frequency.note(handle)
        text = "backup skipped, the disk is still busy"
        if not handle.skipped:
            self._saved_step = position.global_step
            text = f"saving backup of step {self._saved_step} to {self.backup_dir}"
        if not handle.by_another:
            self._tell(f"Epoch {progress.epoch + 1}: {text}")
        if news := progress.frequency.news():
            self._tell(news)

    def _end_if_preempted(self, epoch: int, batch: int) -> None:
        signals, saver = self._signals, self._saver
        if signals is None or saver is None or not signals.is_due(self._progress.global_step):
            return
        saver.drain()  # or the last save might be skipped, as the disk is busy
        self._save(epoch, batch)
        saver.upload()
        signals.end(self, self._saved_step, self.grace_period_s)

    def _expect_signals(self, fit: RunningFit, model: Any) -> None:
        if self._signals is not None:
            self._signals.remove()  # of a fit that raised
        # Before they are installed, so that an interruption leaves them to the next `fit`.
        self._signals = self._companions.signals(fit, model)
        weakref.finalize(self, self._signals.remove).atexit = False
        if not self._signals.install(self.preemption_signals, self):
            self._signals = None

    def _siblings(self) -> list[Any]:
        return [] if self._loop is None else self._loop.callbacks_but(self)

    def begin_at(self, start: Start) -> None:
        """Counts from a backup that this callback has restored, or another one of the `fit`."""
        self._start = start
        if start.epoch is not None:
            # From what was restored, not from 0: or a second interruption would rewind.
            self._current_epoch = start.epoch
            self._progress.begin_epoch(start.epoch, None)
        self._progress.global_step = self._saved_step = start.global_step

    def forget_restored(self) -> None:
        """Leaves what is to be put back to another callback of the `fit`, which is newer."""
        self._restored = None
        if self._loop is not None:
            self._loop.resume(None)

    def _open(self) -> Checkpointer:
        if self._saver is None or self._saver.closed:  # or `fit` raised the last time
            taken = open_directories.take_directory(self, self._target, **self._options)
            self._saver, self._close_at_exit = taken
        return self._saver

    def _trained_model(self) -> Any:  # on JAX `self.model` puts the state back at each access
        return keras_internals.unwrap(self._model)
