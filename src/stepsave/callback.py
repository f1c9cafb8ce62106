"""`BackupAndRestore` for `keras.Model.fit`."""

from __future__ import annotations

import json
import logging
import numbers
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import keras

from stepsave import orbax
from stepsave.arguments import check_choice, check_threads
from stepsave.checkpointer import Checkpointer, WhenBusy
from stepsave.errors import DirectoryBusyError
from stepsave.inventory import COMMIT, PREVIOUS, TRAINING_PATH
from stepsave.resume import TrainingPosition
from stepsave.snapshot.staging import SnapshotMode
from stepsave.spec import Backup, BackupRecord, SaveStats
from stepsave.variables import ModelVariables, model_config, prepare_model, restore_variables

__all__ = ("BackupAndRestore",)

_logger = logging.getLogger("stepsave")

# What callbacks of this process have open, by directory. A notebook that was interrupted
# and makes a new callback for the same directory must not be refused because of the old one.
_savers: weakref.WeakValueDictionary[str, Checkpointer] = weakref.WeakValueDictionary()


class BackupAndRestore(keras.callbacks.Callback):
    """Backs up the training state in the background and restores it after an interruption.

    A drop-in for `keras.callbacks.BackupAndRestore`. Training waits only until the state is
    copied into a host buffer; background threads write it and commit it, weights and
    position together. If training is interrupted, the same script, run again, goes on from
    the last committed backup.

    Example:
        ```python
        backup = stepsave.BackupAndRestore("backup", save_freq=5)
        model.fit(x, y, epochs=10, callbacks=[backup])
        ```

    Attributes:
        async_safe: Tells Keras that this callback does not forbid asynchronous dispatch.
            What Keras may then run on another thread only notes a number.
    """

    async_safe = True

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        delete_checkpoint: bool = True,
        *,
        double_checkpoint: bool = False,
        when_busy: WhenBusy = "wait",
        snapshot: SnapshotMode = "auto",
        writer_threads: int | None = None,
        verbose: int = 0,
    ) -> None:
        """Makes the callback; the directory is opened when `fit` begins.

        Args:
            backup_dir: Directory for the backup, its own: nothing else may be in it.
            save_freq: `"epoch"` to save when an epoch ends, or a number of batches. Batches
                are counted exactly, across epochs and with `steps_per_execution`.
            delete_checkpoint: Whether to remove the backup when `fit` has completed.
            double_checkpoint: Whether to keep the backup before the newest too, and fall
                back to it if the newest cannot be read.
            when_busy: What a due save does while both host buffers are still in use:
                `"wait"`, or `"skip"` it.
            snapshot: Where the state is copied first: `"device"`, `"host"`, or `"auto"`, which
                takes device memory where there is enough; see `Checkpointer`.
            writer_threads: Background threads that write; None for a default.
            verbose: 1 prints a line per save and restore.

        Raises:
            ValueError: If an argument is invalid.
        """
        super().__init__()
        if not backup_dir:
            raise ValueError("Empty `backup_dir` argument passed")
        self.backup_dir = os.fspath(backup_dir)
        self.save_freq = _check_save_freq(save_freq)
        self.delete_checkpoint = delete_checkpoint
        self.double_checkpoint = double_checkpoint
        check_choice("when_busy", when_busy, ("wait", "skip"))
        check_choice("snapshot", snapshot, ("auto", "device", "host"))
        self.when_busy: WhenBusy = when_busy
        self.snapshot: SnapshotMode = snapshot
        self.writer_threads = None if writer_threads is None else check_threads(writer_threads)
        self.verbose = verbose
        self._saver: Checkpointer | None = None
        self._close_at_exit: weakref.finalize[Any, Any] | None = None
        self._variables: ModelVariables | None = None
        self._variables_checked = False  # in this epoch
        self._last_records: tuple[BackupRecord | None, BackupRecord | None] = (None, None)
        self._last_stats: SaveStats | None = None
        self._fit_thread = threading.get_ident()
        self._ended_guard = threading.Lock()
        self._reset_position()

    def _reset_position(self) -> None:
        # These two mean the same as in Keras's callback, whose tests read them: epochs
        # completed, and the index of the last batch in this epoch.
        self._current_epoch = 0
        self._last_batch_seen = 0
        self._epoch = 0
        self._in_epoch = False
        self._global_step = 0
        self._saved_step = 0
        self._batches_done = 0  # in this epoch, all before the batch in progress
        self._batch_begun = 0
        self._batches_ended = 0  # as told, perhaps from Keras's dispatch threads
        self._save_is_due = False
        self._steps: int | None = None  # of an epoch, if Keras knows

    # Keras's callback has these attributes, and its tests overwrite the files to see that
    # the backup is then unreadable.

    @property
    def _weights_path(self) -> str:
        return self._file_of(0, orbax.MANIFEST_PATH, COMMIT)

    @property
    def _training_metadata_path(self) -> str:
        return self._file_of(0, TRAINING_PATH, COMMIT)

    @property
    def _prev_weights_path(self) -> str:
        return self._file_of(1, orbax.MANIFEST_PATH, PREVIOUS)

    @property
    def _prev_training_metadata_path(self) -> str:
        return self._file_of(1, TRAINING_PATH, PREVIOUS)

    def _file_of(self, which: int, path: str, marker: str) -> str:
        if self._saver is not None and not self._saver.closed:
            self._last_records = (self._saver.committed, self._saver.previous)
        record = self._last_records[which]
        below = marker if record is None else os.path.join(record.directory, path)
        return os.path.join(self.backup_dir, below)

    def stats(self) -> SaveStats | None:
        """What saving has cost in this fit, or the last one; None before the first."""
        return self._last_stats if self._saver is None else self._saver.stats()

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Restores the last committed backup, if there is one."""
        self._fit_thread = threading.get_ident()
        self._reset_position()
        self._variables = None
        model = self._trained_model()
        saver = self._open()
        backup = saver.restore()
        if backup is not None:
            self._restore(model, backup)
        if model.built:
            self._prepare(saver, model)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Waits until everything is durable, and removes the backup if so asked.

        Raises:
            SaveFailedError: If a save failed; the backup is then kept.
        """
        model = self._trained_model()
        _set_initial_epoch(model, None)  # here too: `fit` may have had no epoch left to run
        saver, self._saver = self._saver, None
        if saver is None or saver.closed:
            return
        self._last_records = (saver.committed, saver.previous)
        if self._close_at_exit is not None:
            self._close_at_exit.detach()
        try:
            saver.close(delete_backup=self.delete_checkpoint)
        finally:
            self._last_stats = saver.stats()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        # `fit` has read it. Left there, the next `fit` of this model would skip epochs.
        _set_initial_epoch(self._trained_model(), None)
        self._epoch = epoch
        self._in_epoch = True
        self._steps = self._steps_per_epoch()
        self._batches_done = self._batches_ended = self._batch_begun = 0
        self._variables_checked = False

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._advance(self._batches_ended)
        if self._save_is_due:
            self._save(self._epoch, self._batches_done)
        self._in_epoch = False
        self._current_epoch = epoch + 1
        self._last_batch_seen = 0
        if self.save_freq == "epoch":
            self._save(epoch + 1, 0)

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        # Always called by the thread of `fit`, after the last step and before the next, and
        # without a device sync; so with asynchronous dispatch this is where to save.
        self._batch_begun = batch
        if self._saver is not None:
            self._saver.raise_failed()
        if batch > self._batches_done:
            self._last_batch_seen = batch - 1
            self._advance(batch)
        if self._save_is_due:
            self._save(self._epoch, self._batches_done)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        with self._ended_guard:
            self._batches_ended = max(self._batches_ended, batch + 1)
        if threading.get_ident() != self._fit_thread:
            return  # dispatched asynchronously: the next step may already be running
        self._last_batch_seen = batch
        self._advance(batch + 1)
        if self._save_is_due:
            self._save(self._epoch, self._batches_done)

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        # Validation inside `fit`: a save due after the last batch is made before it, so
        # that an interruption of the validation does not lose it.
        if not self._in_epoch:
            return
        # Dispatch threads may not have told of the last batch yet. That it has ended is
        # certain; how many batches it was, only where each execution is one.
        single = self._trained_model().steps_per_execution == 1
        self._advance(max(self._batches_ended, self._batch_begun + 1 if single else 0))
        if self._save_is_due:
            self._save(self._epoch, self._batches_done)

    def _advance(self, batches_done: int) -> None:
        """Takes note that so many batches of this epoch are done."""
        if self._steps is not None:
            # With several steps per execution Keras numbers the last one as if it were full.
            batches_done = min(batches_done, self._steps)
        passed = batches_done - self._batches_done
        if passed <= 0:
            return
        before = self._global_step
        self._batches_done = batches_done
        self._global_step += passed
        if isinstance(self.save_freq, int):
            # Due when a multiple of `save_freq` is passed, so that the count stays exact
            # where several batches are passed at once.
            every = self.save_freq
            self._save_is_due |= self._global_step // every > before // every

    def _save(self, epoch: int, batch: int) -> None:
        began_s = time.perf_counter()
        self._save_is_due = False
        saver = self._saver
        if saver is None or saver.closed:
            raise DirectoryBusyError(
                f"{self.backup_dir}: another callback of this process has taken this backup "
                "directory over. Give each its own directory."
            )
        if self._global_step <= self._saved_step:
            return  # an epoch without batches: this state is saved already
        model = self._trained_model()
        position = TrainingPosition(self._global_step, epoch, batch, self._steps)
        variables = self._collect(saver, model)
        metadata = {
            "backend": keras.backend.backend(),
            "keras_version": keras.version(),
            "position": position.to_json(),
            "build_config": _build_config(model),
        }
        handle = saver.save_leaves(
            self._global_step, variables.paths, variables.values(), metadata, began_s=began_s
        )
        if handle.skipped:
            self._tell(f"Epoch {self._epoch + 1}: backup skipped, the disk is still busy")
            return
        self._saved_step = self._global_step
        self._tell(
            f"Epoch {self._epoch + 1}: saving backup of step {self._global_step} to "
            f"{self.backup_dir}"
        )

    def _collect(self, saver: Checkpointer, model: Any) -> ModelVariables:
        """The model's variables, listed again when there are more of them.

        That is looked at once per epoch: listing them takes time in a deep model, and Keras
        makes variables late only in the first step of a fit.
        """
        variables = self._variables
        is_current = variables is not None and (self._variables_checked or variables.is_current())
        self._variables_checked = self._in_epoch
        if variables is None or not is_current:
            variables = self._variables = ModelVariables(model)
            config = model_config(model)
            saver.attach({} if config is None else {"model_config": {"config": config}})
        return variables

    def _prepare(self, saver: Checkpointer, model: Any) -> None:
        """Makes layout and buffers before the first step, so that no save pays for them."""
        prepare_model(model, None)
        variables = self._collect(saver, model)
        saver.prepare_leaves(variables.paths, variables.values())

    def _restore(self, model: Any, backup: Backup) -> None:
        metadata = backup.metadata
        position = TrainingPosition.from_json(metadata.get("position"))
        prepare_model(model, metadata.get("build_config"))
        restore_variables(model, backup.state, metadata.get("backend"))
        epoch = position.resume_epoch
        _set_initial_epoch(model, epoch)
        # From what was restored, not from 0: or a second interruption would rewind.
        self._current_epoch = self._epoch = epoch
        self._global_step = self._saved_step = position.global_step
        self._tell(f"Restored backup of step {backup.step}: going on at epoch {epoch + 1}")

    def _open(self) -> Checkpointer:
        if self._saver is not None and not self._saver.closed:
            return self._saver  # `fit` raised the last time
        key = os.path.realpath(self.backup_dir)
        other = _savers.get(key)
        if other is not None:
            other.close()  # of a fit that was interrupted, or it would have closed it itself
        self._saver = saver = Checkpointer(
            self.backup_dir,
            double_checkpoint=self.double_checkpoint,
            when_busy=self.when_busy,
            snapshot=self.snapshot,
            writer_threads=self.writer_threads,
        )
        # A callback is told nothing when `fit` raises; its saves are finished when it is
        # collected or the interpreter exits, and a failure is printed then.
        self._close_at_exit = weakref.finalize(self, saver.close)
        _savers[key] = saver
        return saver

    def _trained_model(self) -> Any:
        # Not `self.model`: on JAX that property puts the state back into the variables at
        # each access. torch's DistributedDataParallel wraps the model.
        model = self._model
        return getattr(model, "module", model) if _is_wrapped(model) else model

    def _steps_per_epoch(self) -> int | None:
        steps = (self.params or {}).get("steps")
        return int(steps) if isinstance(steps, numbers.Integral) else None

    def _tell(self, message: str) -> None:
        if not self.verbose:
            return
        if keras.config.is_interactive_logging_enabled():
            print(f"\n{message}", flush=True)  # noqa: T201  as Keras's callbacks do
        else:
            _logger.info("%s", message)


def _check_save_freq(save_freq: object) -> str | int:
    received = f"Invalid value for argument `save_freq`. Received: save_freq={save_freq}. "
    if save_freq is False:
        raise ValueError(
            f"{received}`False` (no periodic saves) makes sense only together with saving "
            "before preemption, which this version does not have. Expected 'epoch' or a "
            "positive integer."
        )
    if save_freq == "epoch":
        return "epoch"
    if isinstance(save_freq, numbers.Integral) and save_freq is not True and int(save_freq) >= 1:
        return int(save_freq)
    raise ValueError(f"{received}Expected 'epoch' or a positive integer.")


def _set_initial_epoch(model: Any, epoch: int | None) -> None:
    # Private, but the one way for a callback to say where `fit` begins: Keras's own does
    # the same, and all three `fit`s read it right after `on_train_begin`.
    model._initial_epoch = epoch  # noqa: SLF001


def _build_config(model: Any) -> Any:
    config = model.get_build_config()
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError):
        return None  # of a custom layer; such a model must be built before it is restored


def _is_wrapped(model: Any) -> bool:
    return type(model).__name__ == "DistributedDataParallel"
