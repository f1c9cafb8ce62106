"""The trainings of the demo: what runs in its child processes."""

# The parent process reads what is printed; Keras calls hooks with arguments that they do not need.
# ruff: noqa: T201, ARG002

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import stepsave
from stepsave.demo.facts import EPOCHS, SAVE_FREQ, Comparison, InFlight, Outcome

__all__ = ("compare", "train")

_BATCH_SIZE = 64
_ROUNDS = 6  # epochs measured with each callback

Dataset = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def train(directory: str, announce_from: list[int] | None) -> None:
    """Trains to the end, from the backup in the directory if there is one.

    Prints the `Outcome`, and before it each save in flight that may be interrupted.

    Args:
        directory: Backup directory.
        announce_from: Epoch and number of batches in it from which on to print saves in
            flight as `InFlight`; None to print none.
    """
    keras.utils.set_random_seed(0)
    (images, labels), test_set = _load_digits()
    model = _build_model()
    backup = stepsave.BackupAndRestore(directory, save_freq=SAVE_FREQ)
    start = _StartRecorder()
    callbacks: list[Any] = [backup, start]  # in this order: `start` looks after the restore
    if announce_from is not None:
        callbacks.append(_Announcer(backup, announce_from))
    model.fit(images, labels, batch_size=_BATCH_SIZE, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    outcome = Outcome(
        first_epoch=start.epoch,
        first_batch=start.batch,
        first_step=start.step,
        last_step=int(model.optimizer.iterations.numpy()),
        accuracy=model.evaluate(*test_set, verbose=0, return_dict=True)["accuracy"],
        digest=_digest(model),
    )
    print(outcome.to_line(), flush=True)


def compare(directory: str) -> None:
    """Measures stepsave's callback next to Keras's own; prints the `Comparison`.

    Args:
        directory: A directory below which to write.
    """
    keras.utils.set_random_seed(0)
    (images, labels), _ = _load_digits()
    model = _build_model()
    keras_callbacks: Any = keras.callbacks  # partly and wrongly typed
    ours, theirs = _Stopwatch(), _Stopwatch()
    durables_s: list[float] = []
    stats: stepsave.SaveStats | None = None

    def fit_one_epoch(callbacks: list[Any]) -> None:
        model.fit(images, labels, batch_size=_BATCH_SIZE, verbose=0, callbacks=callbacks)

    fit_one_epoch([_Stopwatch().callback])  # compiles
    for turn in range(_ROUNDS):  # by turns, so that a noisy moment hits both
        backup = stepsave.BackupAndRestore(
            os.path.join(directory, f"stepsave-{turn}"), save_freq=SAVE_FREQ
        )
        fit_one_epoch([ours.callback, backup])
        stats = backup.stats()
        assert stats is not None
        durables_s.append(stats.durable_median_s)
        keras_backup = keras_callbacks.BackupAndRestore(
            os.path.join(directory, f"keras-{turn}"), save_freq=SAVE_FREQ
        )
        fit_one_epoch([theirs.callback, keras_backup])
    assert stats is not None
    comparison = Comparison(
        state_bytes=stats.state_bytes // stats.started,
        writer=stats.writer,
        saves=len(ours.saves_s),
        stall_s=statistics.median(ours.saves_s),
        durable_s=statistics.median(durables_s),
        keras_stall_s=statistics.median(theirs.saves_s),
    )
    print(comparison.to_line(), flush=True)


def _load_digits() -> tuple[Dataset, Dataset]:
    """Returns 1,347 images for training and 450 for the test, with their labels."""
    digits: Any = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    parts: Any = train_test_split(
        images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    train_images, test_images, train_labels, test_labels = parts
    return (train_images, train_labels), (test_images, test_labels)


def _build_model() -> Any:
    """Returns a compiled model, wider than digits need: a write shall take some time."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(2048, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    return model


def _digest(model: Any) -> str:
    """Returns a SHA-256 of every bit that training changes in the model and the optimizer.

    Seeds of the dropout are among the variables. Their names are left out: Keras numbers them.
    """
    digest = hashlib.sha256()
    for variable in (*model.variables, *model.optimizer.variables):
        array = np.asarray(keras.ops.convert_to_numpy(variable.value))
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class _StartRecorder(keras.callbacks.Callback):
    """Notes where training begins, as the optimizer and `fit` see it.

    Attributes:
        step: The optimizer's step counter when training began.
        epoch: Epoch of the first batch that is trained, from 0; -1 if none is.
        batch: That batch in the epoch, from 0; -1 if none is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.epoch = self.batch = -1
        self._current_epoch = -1

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        model: Any = self.model
        self.step = int(model.optimizer.iterations.numpy())

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self.epoch < 0:
            self.epoch, self.batch = self._current_epoch, batch


class _Announcer(keras.callbacks.Callback):
    """Prints each save that is in flight in the middle of an epoch, from a given moment on.

    It looks when the next batch begins: the save is made when all callbacks know that the
    batch before has ended.
    """

    def __init__(self, backup: stepsave.BackupAndRestore, announce_from: list[int]) -> None:
        super().__init__()
        self._backup = backup
        self._announce_from = announce_from
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        done = batch  # batches, as they are numbered from 0
        if not done or [self._epoch, done] < self._announce_from:
            return
        params: Any = self.params
        steps_per_epoch = params["steps"]
        step = self._epoch * steps_per_epoch + done
        stats = self._backup.stats()
        if step % SAVE_FREQ == 0 and stats is not None and stats.started > stats.committed:
            print(InFlight(self._epoch, done, steps_per_epoch, step).to_line(), flush=True)


class _Stopwatch:
    """Measures how long training waits between two batches for a callback that saves.

    stepsave saves when all callbacks know that a batch has ended, Keras's callback when it is
    told so itself; both do it before the next batch begins. Without a save this is at most
    0.1 ms, or 0.4 ms on PyTorch, which reads the next batch in this time.

    Attributes:
        callback: Keras callback to put before the measured one. As it is not `async_safe`,
            Keras waits for each step before it calls the callbacks; so no time of a step is
            counted as time of a save.
        saves_s: From the end of each batch after which a save is due to the next batch.
    """

    def __init__(self) -> None:
        self.saves_s: list[float] = []
        self._ended_s = 0.0
        self.callback: Any = keras.callbacks.LambdaCallback(
            on_train_batch_end=self._end_batch, on_train_batch_begin=self._begin_batch
        )

    def _end_batch(self, batch: int, logs: Any) -> None:
        self._ended_s = time.perf_counter()

    def _begin_batch(self, batch: int, logs: Any) -> None:
        # No save is due after the last batch of the epoch.
        if batch and batch % SAVE_FREQ == 0:
            self.saves_s.append(time.perf_counter() - self._ended_s)
