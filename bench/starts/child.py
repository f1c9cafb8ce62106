"""One process of `bench.starts`: trains, says what it took, and is killed.

Imports Keras: set `KERAS_BACKEND` first.
"""

# ruff: noqa: ARG002  Keras calls hooks with arguments that we do not need
from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from awscrt.checksums import crc64nvme

from bench.fits.probe import Hooks, device_sync
from bench.process import reset_peak, status_bytes
from bench.saves import cold
from bench.starts.plan import EVERY, KERAS, NONE, ORBAX, OURS, RESUME, Task

BATCH, BATCHES, INPUTS = 8, 1000, 64  # an epoch that no process comes to the end of
POLL_S = 0.005


class Watch(keras.callbacks.Callback):
    """Times the way to the first batch, proves the state, and kills the process after the last.

    Last in the list of callbacks, so that what the others do at the same moment is in it. Its
    hook at the end of a batch has Keras wait for each step, whatever is compared.
    """

    def __init__(self, task: Task, callback: Any, hooks: Hooks) -> None:
        super().__init__()
        self.report: dict[str, Any] = {}
        self.begin_s = math.nan
        self._task = task
        self._callback = callback
        self._hooks = hooks
        self._first: int | None = None
        self._paused_s = 0.0
        self._peak_bytes = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._first is None:
            self._first = self.report["began_at"] = batch
            with self._paused():
                self.report["restored"], self.report["state_bytes"] = digests(self._model)
            self.report["digest_s"] = self._paused_s
        done = batch - self._first
        with self._paused():
            if done == EVERY * self._task.saves:
                self.report["saved"], _ = digests(self._model)
                self.report["saved_at"] = batch
            if (done + 1) % EVERY == 0 or "saved" in self.report:
                wait_durable(self._task.subject, self._callback)  # a save finds the disk idle

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert self._first is not None
        done = batch - self._first + 1
        if done == 1:
            device_sync(self._model)
            self.report["first_s"] = time.perf_counter() - self.begin_s - self._paused_s
            self._note_peak()
            self.report["peak_first_bytes"] = self._peak_bytes
        if done in (1, EVERY) and self._task.subject == OURS:
            with self._paused():
                self.report.setdefault("touched", []).append(touched(self._callback))
        if "saved" in self.report:
            self._end()

    def _end(self) -> None:
        """Says what was found, and dies as a process does that is killed: at once."""
        assert self._first is not None
        self._note_peak()
        saves = [self._first + EVERY * number for number in range(1, self._task.saves + 1)]
        self.report["saves_s"] = [self._hooks.save_s(done) for done in saves]
        self.report["peak_bytes"] = self._peak_bytes
        self.report["end_bytes"] = status_bytes("VmRSS")
        if self._task.subject == OURS:
            self.report["absent_bytes"] = absent_bytes(self._callback)
        print(json.dumps(self.report), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """What the benchmark itself does is in no time and in no peak."""
        begin_s = time.perf_counter()
        self._note_peak()
        yield
        reset_peak()
        self._paused_s += time.perf_counter() - begin_s

    def _note_peak(self) -> None:
        self._peak_bytes = max(self._peak_bytes, status_bytes("VmHWM"))


def digests(model: Any) -> tuple[dict[str, str], int]:
    """Checksums of 64 bits of all variables, in their order, by collection; and their bytes."""
    device_sync(model)
    if keras.backend.backend() == "jax":
        model.jax_state_sync()
    collections = {
        "trainable_variables": model.trainable_variables,
        "non_trainable_variables": model.non_trainable_variables,
        "optimizer_variables": model.optimizer.variables,
        "metrics_variables": model.metrics_variables,
    }
    found: dict[str, str] = {}
    size_bytes = 0
    for name, variables in collections.items():
        digest = 0
        for variable in variables:
            value = np.ascontiguousarray(keras.ops.convert_to_numpy(variable.value))
            size_bytes += value.nbytes
            digest = crc64nvme(value.reshape(-1).view(np.uint8).data, digest)
        found[name] = f"{len(variables)} variables, {digest:016x}"
    return found, size_bytes


def wait_durable(subject: str, callback: Any) -> None:
    """Returns when the saves so far are where the subject wants them."""
    if subject == ORBAX:
        callback.wait_until_finished()
    if subject == OURS:
        while (stats := callback.stats()).committed < stats.started:
            assert not stats.failed, stats
            time.sleep(POLL_S)
        assert not stats.skipped, stats


def touched(callback: Any) -> float:
    """The part of the pages of stepsave's buffers that are there.

    All of them after the first batch: compiling gave the time to touch them. Fewer, right before
    the first save: that pays for the rest, or waits.
    """
    pages = _pages(callback)
    return float(sum(each.sum() for each in pages) / sum(map(len, pages)))


def absent_bytes(callback: Any) -> int:
    """What stepsave's buffers will still take: their pages come in the background."""
    return sum(int(len(each) - each.sum()) for each in _pages(callback)) * mmap.PAGESIZE


def _pages(callback: Any) -> list[Any]:
    return [cold.present(memory) for memory in callback._saver._capture._pool.memories]


def make_callbacks(subject: str, directory: str) -> list[Any]:
    """The callback under test, as a script makes it; what that imports is in its time."""
    if subject == NONE:
        return []
    if subject == KERAS:
        return [keras.callbacks.BackupAndRestore(directory, save_freq=EVERY)]
    if subject == ORBAX:
        return [keras.callbacks.OrbaxCheckpoint(directory, save_freq=EVERY, max_to_keep=1)]
    import stepsave

    return [stepsave.BackupAndRestore(directory, save_freq=EVERY)]


def build(task: Task) -> Any:
    """A stack of Dense layers with Adam, its slots included, of other values in each phase."""
    keras.utils.set_random_seed(1 if task.phase == RESUME else 0)
    inputs = keras.Input((INPUTS,))
    outputs = keras.layers.Dense(task.width)(inputs)
    for _ in range(task.layers):
        outputs = keras.layers.Dense(task.width, "tanh")(outputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(outputs))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def main(text: str) -> None:
    task = Task.from_json(text)
    model = build(task)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH * BATCHES, INPUTS), np.float32)
    y = rng.standard_normal((BATCH * BATCHES, 1), np.float32)
    begin_s = time.perf_counter()
    callbacks = make_callbacks(task.subject, task.directory)
    make_s = time.perf_counter() - begin_s
    watch = Watch(task, callbacks[0] if callbacks else None, Hooks(callbacks))
    watch.report |= {"make_s": make_s, "before_bytes": status_bytes("VmRSS")}
    watch.begin_s = time.perf_counter()
    if task.subject == ORBAX and task.phase == RESUME:
        model.load_weights(task.directory)
    model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[*callbacks, watch])
    raise RuntimeError(f"`fit` came to its end after {BATCHES} batches: {watch.report}")


if __name__ == "__main__":
    main(sys.argv[1])
