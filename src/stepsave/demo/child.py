"""The trainings of the demo: what runs in its child processes."""

# The parent process reads what is printed; Keras calls hooks with arguments that they do not need.
# ruff: noqa: T201, ARG002

from __future__ import annotations

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
        first_step=start.step,
        last_step=int(model.optimizer.iterations.numpy()),
        accuracy=model.evaluate(*test_set, verbose=0, return_dict=True)["accuracy"],
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

    fit_one_epoch([_Stopwatch().begin])  # compiles
    for turn in range(_ROUNDS):  # by turns, so that a noisy moment hits both
        backup = stepsave.BackupAndRestore(
            os.path.join(directory, f"stepsave-{turn}"), save_freq=SAVE_FREQ
        )
        fit_one_epoch(ours.around(backup))
        stats = backup.stats()
        assert stats is not None
        durables_s.append(stats.durable_median_s)
        keras_backup = keras_callbacks.BackupAndRestore(
            os.path.join(directory, f"keras-{turn}"), save_freq=SAVE_FREQ
        )
        fit_one_epoch(theirs.around(keras_backup))
    assert stats is not None
    comparison = Comparison(
        state_bytes=stats.state_bytes // stats.started,
        writer=stats.writer,
        saves=len(ours.hooks_s),
        stall_s=statistics.median(ours.hooks_s),
        durable_s=statistics.median(durables_s),
        keras_stall_s=statistics.median(theirs.hooks_s),
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


class _StartRecorder(keras.callbacks.Callback):
    """Notes where training begins, as the optimizer and `fit` see it."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = EPOCHS
        self.step = 0

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        model: Any = self.model
        self.step = int(model.optimizer.iterations.numpy())

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self.epoch = min(self.epoch, epoch)


class _Announcer(keras.callbacks.Callback):
    """Prints each save that is in flight, from a given moment on; comes after `backup`."""

    def __init__(self, backup: stepsave.BackupAndRestore, announce_from: list[int]) -> None:
        super().__init__()
        self._backup = backup
        self._announce_from = announce_from
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if [self._epoch, batch + 1] < self._announce_from:
            return
        params: Any = self.params
        steps_per_epoch = params["steps"]
        step = self._epoch * steps_per_epoch + batch + 1
        stats = self._backup.stats()
        if step % SAVE_FREQ == 0 and stats is not None and stats.started > stats.committed:
            print(InFlight(self._epoch, batch + 1, steps_per_epoch, step).to_line(), flush=True)


class _Stopwatch:
    """Measures what a callback does when a batch after which it saves has ended.

    Attributes:
        begin: Keras callback to put before the measured one. As it is not `async_safe`,
            Keras waits for each step before it calls the callbacks; so no time of a step is
            counted as time of a save.
        hooks_s: Time of each hook call that saved.
    """

    def __init__(self) -> None:
        self.hooks_s: list[float] = []
        self._began_s = 0.0
        self.begin: Any = keras.callbacks.LambdaCallback(on_train_batch_end=self._begin_hook)
        self._end: Any = keras.callbacks.LambdaCallback(on_train_batch_end=self._end_hook)

    def around(self, callback: Any) -> list[Any]:
        """Returns callbacks for a `fit` of one epoch that measure the given one."""
        return [self.begin, callback, self._end]

    def _begin_hook(self, batch: int, logs: Any) -> None:
        self._began_s = time.perf_counter()

    def _end_hook(self, batch: int, logs: Any) -> None:
        if (batch + 1) % SAVE_FREQ == 0:
            self.hooks_s.append(time.perf_counter() - self._began_s)
