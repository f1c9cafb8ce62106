"""Models, states and child processes for the tests in this directory."""
# ruff: noqa: ARG002  callbacks have Keras's signatures

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import stepsave

BACKEND = keras.backend.backend()
BACKENDS = ("jax", "tensorflow", "torch")
DISPATCHES_ASYNC = BACKEND != "tensorflow"  # Keras: only where `IS_THREAD_SAFE`
COLLECTIONS = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)
several_steps_per_call = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras <= 3.15 on torch raises for steps_per_execution > 1"
)
STEPS = 7
BATCH = 4
X = np.random.default_rng(0).random((STEPS * BATCH, 3), np.float32)
Y = np.random.default_rng(1).random((STEPS * BATCH, 1), np.float32)


def is_left(number):
    """Whether `make test-all` leaves a slow case of a matrix: none on torch, where it is quick.

    On the others that takes most of the time of all tests: each has every other one.
    """
    return BACKEND != "torch" and number % 2 != BACKENDS.index(BACKEND)


class InterruptionError(RuntimeError):
    """What the tests end a training with."""


class Interrupt(keras.callbacks.Callback):
    """Raises at one point of a training, and notes the model's state just before.

    Defines no `on_train_batch_end`, so that dispatch stays asynchronous.
    """

    def __init__(self, *, step=None, epoch_begin=None, epoch_end=None, train_begin=False):
        super().__init__()
        self.step = step  # batches done, over all epochs of this fit
        self.epoch_begin = epoch_begin
        self.epoch_end = epoch_end
        self.train_begin = train_begin
        self.begun = 0
        self.epochs = []
        self.state = None
        self.initial_epoch = None

    def interrupt(self):
        self.state = state_of(self.model)
        raise InterruptionError("interrupted by the test")

    def on_train_begin(self, logs=None):
        self.initial_epoch = self._model._initial_epoch
        if self.train_begin:
            self.interrupt()

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append(epoch)
        if epoch == self.epoch_begin:
            self.interrupt()

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch_end:
            self.interrupt()

    def on_train_batch_begin(self, batch, logs=None):
        if self.begun == self.step:
            self.interrupt()
        self.begun += 1


class Synchronous(keras.callbacks.Callback):
    """Makes Keras dispatch synchronously, and may interrupt there."""

    def __init__(self, *, step=None):
        super().__init__()
        self.step = step
        self.ended = 0
        self.state = None

    def on_train_batch_end(self, batch, logs=None):
        self.ended += 1
        if self.ended == self.step:
            self.state = state_of(self.model)
            raise InterruptionError("interrupted by the test")


@keras.saving.register_keras_serializable("stepsave_tests")
class StepLayer(keras.layers.Layer):
    """Every variable of it equals the number of steps trained, with `SGD(1.0)`."""

    def __init__(self, width=5, count=3, **kwargs):
        super().__init__(**kwargs)
        self.width, self.count = width, count

    def build(self, _):
        def add(name, *, trainable):
            shape = (self.width, 4)
            return self.add_weight(name=name, shape=shape, initializer="zeros", trainable=trainable)

        self.counters = [add(f"counter_{i}", trainable=False) for i in range(self.count)]
        self.weights_up = [add(f"weight_{i}", trainable=True) for i in range(self.count)]

    def call(self, x):
        for counter in self.counters:
            counter.assign_add(keras.ops.ones(counter.shape))
        total = sum(keras.ops.sum(weight) for weight in self.weights_up)
        return x[:, :1] * 0 + total

    def get_config(self):
        return super().get_config() | {"width": self.width, "count": self.count}


@keras.saving.register_keras_serializable("stepsave_tests")
def climb(_, predicted):
    """A loss whose gradient is -1 for each weight of a `StepLayer`."""
    return -keras.ops.mean(predicted, axis=-1)


def step_model(width=5, count=3, steps_per_execution=1):
    model = keras.Sequential(
        [keras.Input((3,)), StepLayer(width, count, name="steps")], name="stepper"
    )
    model.compile(
        keras.optimizers.SGD(1.0, name="sgd"), climb, steps_per_execution=steps_per_execution
    )
    return model


def step_numbers(model):
    """The distinct values in all variables that should equal the step number."""
    variables = [*model.layers[-1].counters, *model.layers[-1].weights_up]
    values = {float(n) for v in variables for n in np.unique(keras.ops.convert_to_numpy(v))}
    return values | {float(keras.ops.convert_to_numpy(model.optimizer.iterations))}


def small_model(width=4, *, dtype=None, extra=False, optimizer="sgd", names=True):
    """A dense model with names that do not depend on how many were made before."""

    def name(text):
        return text if names else None

    layers = [
        keras.Input((3,)),
        keras.layers.Dense(width, activation="tanh", dtype=dtype, name=name("first")),
    ]
    if extra:
        layers.append(keras.layers.Dense(width, dtype=dtype, name=name("extra")))
    layers.append(keras.layers.Dense(1, dtype=dtype, name=name("last")))
    model = keras.Sequential(layers, name=name("small"))
    if optimizer == "sgd":
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9, name=name("sgd"))
    model.compile(optimizer, "mse")
    return model


def rich_model(optimizer, *, dtype="float32", names=False, steps_per_execution=1):
    """Embedding, batch normalisation and a random layer: every kind of Keras variable."""

    def name(text):
        return text if names else None

    layers = keras.layers
    inputs = x = keras.Input((3,), dtype="int32")
    x = layers.Embedding(10, 4, dtype=dtype, name=name("embedding"))(x)
    x = layers.Flatten(name=name("flat"))(x)
    x = layers.Dense(6, dtype=dtype, name=name("first"))(x)
    x = layers.BatchNormalization(dtype=dtype, name=name("normed"))(x)
    x = layers.Dropout(0.5, dtype=dtype, name=name("dropped"))(x)
    x = layers.Dense(6, dtype=dtype, name=name("second"))(x)
    x = layers.Dropout(0.2, dtype=dtype, name=name("dropped_again"))(x)
    x = layers.Dense(1, dtype=dtype, name=name("last"))(x)
    model = keras.Model(inputs, x, name=name("rich"))
    model.compile(optimizer, "mse", metrics=["mae"], steps_per_execution=steps_per_execution)
    return model


X_INT = np.random.default_rng(2).integers(0, 10, X.shape, dtype=np.int32)


def fit(model, *callbacks, epochs=1, x=X, y=Y, **kwargs):
    return model.fit(
        x, y, batch_size=BATCH, epochs=epochs, callbacks=list(callbacks), verbose=0, **kwargs
    )


def fit_interrupted(model, *callbacks, **kwargs):
    """Runs `fit` and expects the test's interruption to end it."""
    try:
        fit(model, *callbacks, **kwargs)
    except InterruptionError:
        return
    raise AssertionError("fit ended without the interruption that the test is about")


def restored(model, backup_dir, **kwargs):
    """Runs a `fit` up to its first epoch; returns the probe that saw the restored state."""
    probe = Interrupt(train_begin=True)
    callback = stepsave.BackupAndRestore(backup_dir, **kwargs)
    fit_interrupted(model, callback, probe, epochs=1000)
    probe.callback = callback
    callback._saver.close()  # an interrupted callback keeps its directory
    callback._saver = None
    return probe


def leave(callback):
    """Lets an interrupted callback finish and give up its directory, as exiting does."""
    saver, callback._saver = callback._saver, None
    saver.close()


def variables_of(model):
    optimizer = model.optimizer
    for collection in COLLECTIONS:
        if collection == "optimizer_variables":
            variables = [] if optimizer is None else optimizer.variables
        else:
            variables = getattr(model, collection)
        for variable in variables:
            yield collection, variable


def to_numpy(variable):
    return np.array(keras.ops.convert_to_numpy(variable.value))


def state_of(model):
    """All variables bit for bit: (collection, path without numbers, dtype, shape, bytes)."""
    state = []
    for collection, variable in variables_of(model):
        array = to_numpy(variable)
        path = re.sub(r"_\d+(?=_|/|$)", "", variable.path)
        state.append((collection, path, str(array.dtype), array.shape, array.tobytes()))
    return state


def assert_same_state(found, expected, *, metrics=True):
    """Compares two states bit for bit, with a message that names what differs."""
    if not metrics or BACKEND == "tensorflow":
        # Keras on TensorFlow makes most metrics in the first step of a fit.
        found = [entry for entry in found if entry[0] != "metrics_variables"]
        expected = [entry for entry in expected if entry[0] != "metrics_variables"]
    assert [entry[:4] for entry in found] == [entry[:4] for entry in expected]
    differing = [a[:2] for a, b in zip(found, expected, strict=True) if a[4] != b[4]]
    assert not differing
    assert found


def files_below(directory):
    """Contents of every file but the lock, to see that nothing was touched."""
    root = Path(directory)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "LOCK"
    }


def step_directories(backup_dir):
    return sorted(int(name) for name in os.listdir(backup_dir) if name.isdigit())


def child_environment(backend=BACKEND, **variables):
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "KERAS_BACKEND": backend,
        "PYTHONPATH": path,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


class Child:
    """Python code that runs in a fresh process."""

    def __init__(self, code, *arguments, backend=BACKEND, **variables):
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=child_environment(backend, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self, *, returncode=0, timeout=150):
        """Returns what it printed and wrote to stderr, having checked its exit code."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            out, err = self.kill()
            raise AssertionError(f"it hung:\n{out[-2000:]}\n{err[-4000:]}") from None
        assert self.process.returncode == returncode, f"{out[-2000:]}\n{err[-4000:]}"
        return out, err

    def kill(self):
        """Ends it and the workers that it forked; closes its pipes, returns what they held."""
        with contextlib.suppress(ProcessLookupError):  # its workers may outlive it
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.communicate()
