# ruff: noqa: ARG002, NPY002, T201  callbacks have Keras's signatures; the global generator is meant
"""A training with everything that must be put back, to be interrupted and compared.

`serve` makes processes that are killed.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import traceback
from pathlib import Path

import keras
import numpy as np
from rows import SAMPLES, WIDTH, TorchRows, samples

import stepsave

BACKEND = keras.backend.backend()
if BACKEND == "jax":
    # Some hundred trainings compile the same steps; this takes most of their time.
    import jax

    cache = Path(__file__).parents[2] / ".pytest_cache" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
BATCH = 4
STEPS = 7  # the last batch has two samples
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
        self.logs = {}
        self.seen = (
            None  # not after training: EarlyStopping puts the best weights back, all of them
        )

    def on_epoch_end(self, epoch, logs=None):
        # Draws between epochs, as callbacks do, from all that a training may draw from.
        self.epochs.append((epoch, float(np.random.random())))
        self.noise = self.noise + np.random.random(3)
        self.logs[epoch] = dict(logs)
        journal = self.model.get_layer("journal")
        self.seen = np.array(keras.ops.convert_to_numpy(journal.seen.value))

    def get_state(self):
        return {"epochs": self.epochs, "noise": self.noise}

    def set_state(self, state):
        self.epochs, self.noise = state["epochs"], state["noise"]


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


# Data.


class Rows(keras.utils.PyDataset):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.x, self.y = samples()
        self.loaded = []

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        self.loaded.append(index)
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return self.x[rows], self.y[rows]


class ShuffledRows(Rows):
    """Shuffles itself, and says how it is shuffled."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.order = np.arange(SAMPLES)

    def __getitem__(self, index):
        rows = self.order[index * BATCH : (index + 1) * BATCH]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self):
        np.random.shuffle(self.order)

    def get_state(self):
        return self.order

    def set_state(self, state):
        self.order = np.array(state)


def generator():
    x, y = samples()
    random = np.random.default_rng(5)
    while True:
        order = random.permutation(SAMPLES)
        for i in range(STEPS):
            rows = order[i * BATCH : (i + 1) * BATCH]
            yield x[rows], y[rows]


def tf_dataset(*, unknown=False, repeat=False):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(samples()).shuffle(SAMPLES)
    if repeat:
        dataset = dataset.repeat()
    dataset = dataset.batch(BATCH)
    if unknown:
        dataset = dataset.filter(lambda *_: True)
    return dataset


def torch_loader(cls=None, **kwargs):
    import torch

    cls = cls or torch.utils.data.DataLoader
    return cls(TorchRows(), batch_size=BATCH, shuffle=True, **kwargs)


def loader_with_workers():
    import torch

    # An iterator that is collected with the exception that ended it has lost its queues before,
    # and then waits so long for each of its workers: 5 s.
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
    if BACKEND == "torch":
        return torch_loader(num_workers=2)
    # A process with JAX or TensorFlow in it does not always survive a fork.
    multiprocessing.set_forkserver_preload(["rows", "torch.utils.data"])
    return torch_loader(num_workers=2, multiprocessing_context="forkserver")


def stateful_loader():
    from torchdata.stateful_dataloader import StatefulDataLoader

    return torch_loader(StatefulDataLoader)


class GrainRows:
    def __init__(self):
        self.x, self.y = samples()

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return self.x[index], self.y[index]

    def __repr__(self):
        return "GrainRows()"  # grain compares data by this when it goes on at a place


def grain_map():
    import grain

    return grain.MapDataset.source(GrainRows()).seed(3).shuffle().batch(BATCH)


def grain_loader():
    import grain

    sampler = grain.samplers.IndexSampler(SAMPLES, shuffle=True, seed=1, num_epochs=1)
    return grain.DataLoader(
        data_source=GrainRows(), sampler=sampler, operations=[grain.transforms.Batch(BATCH)]
    )


def arrays(shuffle):
    x, y = samples()
    return {"x": x, "y": y, "batch_size": BATCH, "shuffle": shuffle}


SOURCES = {
    "arrays": lambda: arrays(shuffle=True),
    "arrays in order": lambda: arrays(shuffle=False),
    "arrays, batches shuffled": lambda: arrays(shuffle="batch"),
    "PyDataset": lambda: {"x": Rows(), "shuffle": True},
    "PyDataset with threads": lambda: {"x": Rows(workers=2), "shuffle": True},
    "PyDataset with processes": lambda: {
        "x": Rows(workers=2, use_multiprocessing=True),
        "shuffle": True,
    },
    "PyDataset that shuffles itself": lambda: {"x": ShuffledRows(), "shuffle": False},
    "tf.data": lambda: {"x": tf_dataset()},
    "tf.data, repeated": lambda: {"x": tf_dataset(repeat=True), "steps_per_epoch": STEPS},
    "tf.data, length unknown": lambda: {"x": tf_dataset(unknown=True)},
    "torch DataLoader": lambda: {"x": torch_loader()},
    "torch DataLoader with workers": lambda: {"x": loader_with_workers()},
    "StatefulDataLoader": lambda: {"x": stateful_loader()},
    "grain MapDataset": lambda: {"x": grain_map()},
    "grain IterDataset": lambda: {"x": grain_map().to_iter_dataset()},
    "grain DataLoader": lambda: {"x": grain_loader()},
    "generator": lambda: {"x": generator(), "steps_per_epoch": STEPS},
}
NUMBERS = {source: number for number, source in enumerate(SOURCES)}  # alike on each backend

if BACKEND != "torch":
    # Keras forks them, which processes with JAX or TensorFlow in them do not always survive.
    del SOURCES["PyDataset with processes"]


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
            (counts.epochs, counts.noise.tobytes()),
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
    early = keras.callbacks.EarlyStopping("val_loss", patience=50, restore_best_weights=True)
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
