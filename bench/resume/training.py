"""The training that `bench.resume` interrupts, resumes and times.

Imports Keras: set `KERAS_BACKEND` first.
"""

# ruff: noqa: ARG002  Keras calls hooks with arguments that we do not need
from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

import stepsave
from bench.fits.probe import device_sync
from bench.resume.sources import BATCH, SEED, SOURCES, VALUES, Images
from stepsave.fit.keras_data import EpochData
from stepsave.fit.keras_internals import find_fit

NEVER = 1_000_000_000
IDLE_SHARE = 0.2  # of one core, over `IDLE_S`
IDLE_S = 0.05
SETTLE_S = 10.0


class Seen(keras.metrics.Metric):
    """The targets of the last batch: which images it had."""

    def __init__(self) -> None:
        super().__init__(name="seen")
        self.targets = self.add_variable((BATCH, 1), "zeros", name="targets")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.targets.assign(keras.ops.cast(y_true, self.targets.dtype))

    def result(self) -> Any:
        return keras.ops.mean(self.targets)


class Watch(keras.callbacks.Callback):
    """Times the way to the first batch, and ends the fit after a certain one.

    First in the list of callbacks, so that the work of all others is in it. Its hook at the
    end of a batch has Keras wait for each step.
    """

    def __init__(self, last: int) -> None:
        super().__init__()
        self.first: int | None = None
        self.begin_s = self.epoch_s = self.batch_s = self.trained_s = 0.0
        self._last = last

    def times(self) -> dict[str, float]:
        """Seconds from one place to the next."""
        return {
            "restore_s": self.epoch_s - self.begin_s,
            "to_begin_s": self.batch_s - self.epoch_s,
            "to_trained_s": self.trained_s - self.epoch_s,
        }

    def on_train_begin(self, logs: Any = None) -> None:
        self.fit = find_fit(self._model)
        self.begin_s = time.perf_counter()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch_s = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.first is None:
            self.batch_s = time.perf_counter()
            self.first = batch
        if batch >= self._last:
            self._model.stop_training = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == self.first:
            device_sync(self._model)
            self.trained_s = time.perf_counter()


class ReadError(Exception):
    """Ends a fit of which only the data was wanted."""


class Read(keras.callbacks.Callback):
    """Reads what `fit` was given as `fit` itself reads it, trains nothing, and ends the fit."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.read_s = 0.0
        self._begin, self._end = begin, end

    def on_train_begin(self, logs: Any = None) -> None:
        fit = find_fit(self._model)
        assert fit is not None
        data = EpochData(fit.epoch_iterator)
        _, _, stream = next(data.enumerate())
        for _ in range(self._begin):
            next(stream)
        begin_s = time.perf_counter()
        for _ in range(self._end - self._begin):
            next(stream)
        self.read_s = time.perf_counter() - begin_s
        data.adapter.on_epoch_end()  # or threads of a PyDataset would live on
        raise ReadError


class Training:
    """Fits of a tiny model on one source, which is made anew for each, as the callbacks are."""

    def __init__(self, source: str, images: Images, where: Path) -> None:
        self._source = source
        self._images = images
        self._where = where
        self._seen = Seen()
        self._expected: dict[int, np.ndarray] = {}
        inputs = keras.Input((VALUES,))
        outputs = keras.layers.Dense(1)(keras.layers.Rescaling(1 / 255)(inputs))
        self._model = keras.Model(inputs, outputs)
        self._model.compile(keras.optimizers.SGD(1e-6), "mse", metrics=[self._seen])

    def build(self) -> None:
        """Trains one batch: to build a model Keras reads data, which moves some sources on.

        New processes all do that; here only the first fit would.
        """
        self._fit(Watch(0))

    def interrupt(self, batch: int) -> None:
        """Trains so many batches, which leaves a backup, and one more."""
        backup = self._backup(batch, save_freq=batch)
        watch = Watch(batch)
        self._fit(watch, backup)
        stats = backup.stats()
        assert stats is not None
        assert watch.first == 0, "there was a backup already"
        assert (stats.started, stats.failed) == (1, 0), stats
        self._expected[batch] = self._targets()

    def resume(self, batch: int) -> dict[str, float]:
        """Resumes, trains one batch, and compares it with the one that came then.

        Returns:
            Seconds from the first hook of `fit` until the epoch begins, and from there until
            the batch begins and until it is trained. Before the batch begins some sources do
            no more than note the place.
        """
        watch = Watch(batch)
        self._fit(watch, self._backup(batch, save_freq=NEVER))
        assert watch.first == batch, f"went on at batch {watch.first}, not {batch}"
        same = np.array_equal(self._targets(), self._expected[batch])
        assert same, "the first batch after the resume is not the one that was due"
        return watch.times()

    def read_s(self, begin: int, end: int) -> float:
        """Seconds to read the batches between, without training."""
        read = Read(begin, end)
        try:
            self._fit(read)
        except ReadError as e:
            e.__traceback__ = None  # it holds the data
        return read.read_s

    def _backup(self, batch: int, save_freq: int) -> stepsave.BackupAndRestore:
        directory = self._where / str(batch)
        return stepsave.BackupAndRestore(directory, save_freq, delete_checkpoint=False)

    def _fit(self, *callbacks: Any) -> None:
        """As a new process would: seeds, makes the data, and trains."""
        keras.utils.set_random_seed(SEED)
        if "torch" in self._source or "Stateful" in self._source:
            import torch

            torch.manual_seed(SEED)  # Keras does so on its own backend only
        settle()
        data = SOURCES[self._source](self._images)
        data.setdefault("shuffle", False)
        self._model.fit(**data, epochs=1, verbose=0, callbacks=list(callbacks))
        for callback in callbacks:
            if isinstance(callback, Watch) and callback.fit is not None:
                # Ended early, it keeps threads; and collected as garbage, torch waits ten
                # seconds for processes whose end it can no longer see.
                callback.fit.epoch_iterator.reset()
                callback.fit = None

    def _targets(self) -> np.ndarray:
        return np.array(keras.ops.convert_to_numpy(self._seen.targets.value))


def settle() -> None:
    """Waits until what the last fit left behind is gone: threads that still read ahead."""
    gc.collect()
    end_s = time.monotonic() + SETTLE_S
    while time.monotonic() < end_s:
        cpu_s = time.process_time()
        time.sleep(IDLE_S)
        if time.process_time() - cpu_s < IDLE_SHARE * IDLE_S:
            return
