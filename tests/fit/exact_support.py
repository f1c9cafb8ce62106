# ruff: noqa: ARG002, NPY002, T201  callbacks have Keras's signatures; the global generator is meant
"""A training with everything that must be put back, to be interrupted and compared.

`serve` makes processes that are killed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import traceback
from pathlib import Path

import keras
import numpy as np
from exact_sources import BACKEND, SOURCES
from rows import BATCH, SAMPLES, STEPS, WIDTH, samples

import stepsave

if BACKEND == "jax":
    # Some hundred trainings compile the same steps; this takes most of their time.
    import jax

    cache = Path(__file__).parents[2] / ".pytest_cache" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
EPOCHS = 4
SEED = 11


class StopError(RuntimeError):
    """What a training is interrupted by that is not killed."""


@keras.saving.register_keras_serializable("stepsave_tests")
class Journal(keras.layers.Layer):
    """Notes for each step which samples it saw, in a variable: it is saved and restored too."""

    def __init__(self, steps=EPOCHS * (STEPS + 1), count=SAMPLES, **kwargs):
        super().__init__(**kwargs)
        self.steps, self.count = steps, count

    def build(self, _):
        def add(name, shape):
            return self.add_weight(
                name=name, shape=shape, initializer="zeros", trainable=False, dtype="float32"
            )

        self.seen = add("seen", (self.steps, self.count))
        self.step = add("step", ())

    def call(self, x, training=False):
        if training:
            ids = keras.ops.cast(x[:, 0], "int32")
            row = keras.ops.sum(keras.ops.one_hot(ids, self.count, dtype="float32"), axis=0)
            at = keras.ops.one_hot(keras.ops.cast(self.step, "int32"), self.steps, dtype="float32")
            self.seen.assign_add(at[:, None] * row[None, :])
            self.step.assign_add(1.0)
        return x[:, 1:]

    def compute_output_shape(self, shape):
        return (*shape[:-1], shape[-1] - 1)

    def get_config(self):
        return super().get_config() | {"steps": self.steps, "count": self.count}


def make_model(optimizer=None, **compile_arguments):
    layers = keras.layers
    inputs = keras.Input((WIDTH,))
    x = Journal(name="journal", dtype="float32")(inputs)
    x = layers.Dense(6, activation="tanh", name="first")(x)
    x = layers.BatchNormalization(name="normed")(x)
    x = layers.Dropout(0.4, name="dropped")(x)
    x = layers.Dense(1, activation="sigmoid", name="last")(x)
    model = keras.Model(inputs, x, name="exact")
    model.compile(
        optimizer or keras.optimizers.Adam(0.05),
        "binary_crossentropy",
        metrics=["mae", keras.metrics.AUC(num_thresholds=10, name="auc")],
        **compile_arguments,
    )
    return model


class Counts(keras.callbacks.Callback):
    """A callback of a user, with a state."""

    def __init__(self):
        super().__init__()
        self.epochs = []
        self.noise = np.zeros(3)
        self.names = np.array([], "U")
        self.logs = {}
        self.seen = (
            None  # not after training: EarlyStopping puts the best weights back, all of them
        )

    def on_epoch_end(self, epoch, logs=None):
        # Draws between epochs, as callbacks do, from all that a training may draw from.
        self.epochs.append((epoch, float(np.random.random())))
        self.noise = self.noise + np.random.random(3)
        self.names = np.append(self.names, f"epoch {epoch}")
        self.logs[epoch] = dict(logs)
        journal = self.model.get_layer("journal")
        self.seen = np.array(keras.ops.convert_to_numpy(journal.seen.value))

    def get_state(self):
        return {"epochs": self.epochs, "noise": self.noise, "names": self.names}

    def set_state(self, state):
        self.epochs, self.noise, self.names = state["epochs"], state["noise"], state["names"]


class Interrupt(keras.callbacks.Callback):
    """Ends a training in one of three places of an epoch, in one of three ways."""

    def __init__(self, where, how, backup, batch=5, interrupted_epoch=1, first_epoch=0):
        super().__init__()
        self.where, self.how, self.backup, self.batch = where, how, backup, batch
        self.times = 1
        self.interrupted_epoch = interrupted_epoch
        self.first_epoch = first_epoch

    def fire(self):
        if not self.times:
            return
        self.times -= 1
        if self.how == "exception":
            raise StopError
        if self.how == "SIGKILL":
            # What is committed decides, so let it be the same as with an exception.
            self.backup._saver.wait()
        # To this thread: it is noted here, and not a little later.
        signal.raise_signal(getattr(signal, self.how))

    def on_epoch_begin(self, epoch, logs=None):
        # One that began from the start would end the same.
        assert epoch >= self.first_epoch, "the training was not resumed"
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.where == "middle" and (self.epoch, batch) == (self.interrupted_epoch, self.batch):
            self.fire()
        # The last epoch is saved when all callbacks know of its end, so it is killed after that.
        after = self.interrupted_epoch + 1, 1
        if self.where == "epoch end" and self.how != "SIGTERM" and (self.epoch, batch) == after:
            self.fire()

    def on_test_batch_begin(self, batch, logs=None):
        late = batch >= 1 or self._model.steps_per_execution > 1
        if self.where == "validation" and self.epoch == self.interrupted_epoch and late:
            self.fire()

    def on_epoch_end(self, epoch, logs=None):
        if self.where == "epoch end" and self.how == "SIGTERM" and epoch == self.interrupted_epoch:
            self.fire()


class Result:
    """What a training left behind, as bits."""

    def __init__(self, model, history, callbacks):
        early, plateau, counts = callbacks
        variables = [*model.variables, *model.optimizer.variables]
        # Keras numbers names by how many there were before in the process.
        self.bits = {
            f"{i} {re.sub(r'_[0-9]+', '', variable.path)}": _bits(variable)
            for i, variable in enumerate(variables)
        }
        self.logs = counts.logs
        self.history = (history.epoch, history.history)
        best = [np.asarray(weights).tobytes() for weights in early.best_weights or ()]
        self.callbacks = (
            (early.wait, early.best, early.best_epoch, best),
            (plateau.wait, plateau.best, plateau.cooldown_counter),
            (counts.epochs, counts.noise.tobytes(), counts.names.tolist()),
        )
        self.drawn = (
            float(np.random.random()),
            keras.ops.convert_to_numpy(keras.random.uniform((2,))).tolist(),
        )
        self.seen = counts.seen

    def differences(self, other):
        """Names of all that differs, in full."""
        found = [name for name in self.bits if self.bits[name] != other.bits.get(name)]
        for name in ("callbacks", "drawn"):
            mine, theirs = getattr(self, name), getattr(other, name)
            found += [f"{name}: {mine} {theirs}"] if mine != theirs else []
        for epoch, logs in self.logs.items():
            if logs != other.logs[epoch]:
                found.append(f"logs of epoch {epoch}: {logs} {other.logs[epoch]}")
        return found


def _bits(variable):
    return keras.ops.convert_to_numpy(variable.value).tobytes()


def train(
    source,
    backup=None,
    interrupt=None,
    *,
    model=None,
    arguments=None,
    before=(),
    more=(),
    rate_callbacks=True,
    best=True,
):
    """Runs the training of these tests; seeds everything first, as a script does."""
    keras.utils.set_random_seed(SEED)
    if BACKEND != "torch" and ("torch" in source or "Loader" in source):
        import torch

        torch.manual_seed(SEED)  # Keras does so on its backend only
    model = make_model() if model is None else model()
    data = SOURCES[source]()
    data.setdefault("shuffle", False)
    data |= arguments or {}
    early = keras.callbacks.EarlyStopping("val_loss", patience=50, restore_best_weights=best)
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.7, patience=1, min_delta=0.05)
    rate = keras.callbacks.LearningRateScheduler(lambda _, rate: float(rate * 0.9))
    counts = Counts()
    rates = [plateau, rate] if rate_callbacks else []
    callbacks = [*before, early, backup, *rates, counts, *more, interrupt]
    x, y = samples()
    history = model.fit(
        **data,
        epochs=EPOCHS,
        verbose=0,
        validation_data=(x[:12], y[:12]),
        validation_batch_size=BATCH,
        callbacks=[callback for callback in callbacks if callback is not None],
    )
    return Result(model, history, (early, plateau, counts))


SAVE_FREQ = {"middle": 3, "epoch end": "epoch", "validation": STEPS}


def backup_for(directory, how, where="middle", **kwargs):
    """The callback that goes with an interruption: with SIGTERM it saves only then."""
    if how == "SIGTERM":
        return stepsave.BackupAndRestore(
            directory, save_freq=False, save_before_preemption=True, **kwargs
        )
    return stepsave.BackupAndRestore(directory, **{"save_freq": SAVE_FREQ[where]} | kwargs)


def train_until_killed(source, directory, where, how, epochs):
    keras.config.disable_interactive_logging()
    backup = backup_for(directory, how, where)
    train(source, backup, Interrupt(where, how, backup, **epochs))


def serve():
    """Runs trainings that are killed, each in a process of its own; prints how each ended.

    The processes are forked from this one, which has imported everything and computed nothing:
    importing takes longer than these trainings.
    """
    # The last by Keras, on each backend, to seed it where it is installed.
    for name in ("torch", "torchdata.stateful_dataloader", "grain", "tensorflow"):
        importlib.import_module(name)
    for line in sys.stdin:
        arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train_until_killed(*arguments)
                print("the training ended, but was to be interrupted", file=sys.stderr)
            except SystemExit as e:
                status = e.code
            except BaseException:  # noqa: BLE001  what ends a process is printed
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)
