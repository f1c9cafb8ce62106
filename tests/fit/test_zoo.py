"""All that Keras's callback brings back, and more, in models of every kind: see `zoo`."""
# ruff: noqa: ARG002  callbacks have Keras's signatures

import re
import shutil

import exact_support  # noqa: F401  what JAX compiled for one training serves the next
import h5py
import keras
import numpy as np
import pytest
import zoo_steps  # noqa: F401  adds its part to the zoo
import zoo_training  # noqa: F401
from keras_support import BACKENDS, InterruptionError, is_left, leave
from zoo import BACKEND, BATCH, SAMPLES, ZOO

import stepsave

STEPS = SAMPLES // BATCH
EPOCHS = 2
BETWEEN, WITHIN = "between epochs", "within an epoch"
PLACES = {BETWEEN: (1, 0), WITHIN: (1, STEPS // 2)}  # epoch and batch; a save is made at each

# One of each family; the others are slow together.
QUICK = {
    "sequential without Input",
    "several inputs and outputs, by name",
    "nested",
    "subclassed with build, unbuilt",
    "variables of the model's own",
    "a layer that saves itself",
    "stateful LSTM",
    "optimizer: an average put in place",
    "optimizer: one for each part",
    "precision mixed_float16",
    "quantized, with LoRA",
    "Normalization",
    "VAE",
    "GAN",
    "a torch module with buffers",
}


def kinds():
    assert set(ZOO) >= QUICK - {"optimizer: one for each part"}  # Keras 3.14 has no such optimizer
    for number, (name, kind) in enumerate(ZOO.items()):
        if BACKEND not in kind.backends:
            continue
        marks = [] if name in QUICK else [pytest.mark.slow]
        if marks and set(kind.backends) == set(BACKENDS) and is_left(number):
            marks.append(pytest.mark.whole_matrix)
        yield pytest.param(kind, id=name, marks=marks)


class Look(keras.callbacks.Callback):
    """Notes the whole state before some batches, and has more done there."""

    def __init__(self, path, places, then):
        super().__init__()
        self.path, self.places, self.then = path, places, then
        self.found = {}

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        for name, place in self.places.items():
            if place == (self.epoch, batch):
                self.found[name] = everything(self._model, self.path)
                self.then(name)


def everything(model, path):
    """All that Keras's `save_weights` stores, and each variable of a model, as arrays by name."""
    if BACKEND == "jax":
        model.jax_state_sync()  # during an epoch the values are elsewhere
    model.save_weights(path)
    found = stored(path)
    for number, variable in enumerate([*model.variables, *model.optimizer.variables]):
        # A layer that was built at another time has the same variables by other paths.
        name = re.sub(r"_\d+$", "", variable.path.rpartition("/")[-1])
        found[f"variable {number} {name}"] = keras.ops.convert_to_numpy(variable.value)
    for variable in model.metrics_variables:
        value = keras.ops.convert_to_numpy(variable.value)
        if np.any(value):  # Keras on TensorFlow makes some in the first step only
            found[f"metric {variable.path}"] = value
    for number, layer in enumerate(model._flatten_layers()):
        for state in keras.tree.flatten(getattr(layer, "states", None)):
            if isinstance(state, keras.Variable):  # of a stateful RNN
                at = f"state {len(found)} of layer {number} {layer.name}"
                found[at] = keras.ops.convert_to_numpy(state.value)
    return found


def stored(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]} if hasattr(item, "dtype") else {})
        )
    return found


def fit(kind, *callbacks, again):
    """Makes a model and trains it, with other seeds if that is done again, as a new process may."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(2 if again else 1)
    made = kind.make(again)
    made.model.fit(
        made.x,
        made.y,
        epochs=EPOCHS,
        batch_size=BATCH,
        callbacks=list(callbacks),
        verbose=0,
        shuffle=False,  # TensorFlow shuffles by the global seed, which is another one
        **made.fit,
    )
    return made.model


def train_through(kind, tmp_path):
    """Trains without an interruption, and copies the backups of both callbacks on the way.

    Returns the state at each of `PLACES`, and at the end.
    """
    ours = stepsave.BackupAndRestore(tmp_path / "ours", save_freq=STEPS // 2)
    stock = keras.callbacks.BackupAndRestore(str(tmp_path / "stock"))

    def copy(place):
        ours._saver.wait()
        shutil.copytree(tmp_path / "ours", tmp_path / place)
        if place == BETWEEN and kind.keras_takes_it:
            shutil.copytree(tmp_path / "stock", tmp_path / "stock's")

    look = Look(tmp_path / "all.weights.h5", PLACES, copy)
    callbacks = [ours, stock] if kind.keras_takes_it else [ours]
    model = fit(kind, *callbacks, look, again=False)
    return look.found, everything(model, look.path)


def begin_again(kind, callback, place, tmp_path):
    """Restores a backup; returns the state before the first batch after it."""

    def interrupt(_):
        raise InterruptionError("interrupted by the test")

    look = Look(tmp_path / "all.weights.h5", {"begin": PLACES[place]}, interrupt)
    with pytest.raises(InterruptionError):
        fit(kind, callback, look, again=True)
    return look.found["begin"]


def go_on(kind, callback, place, tmp_path):
    """Restores a backup and trains to the end; returns the state at both."""
    look = Look(tmp_path / "all.weights.h5", {"begin": PLACES[place]}, lambda _: None)
    model = fit(kind, callback, look, again=True)
    return look.found["begin"], everything(model, look.path)


def differing(found, expected):
    """Names of what is not the same bits, or only in one of both."""
    return {
        name
        for name in expected.keys() | found.keys()
        if name not in found or name not in expected or bits(found[name]) != bits(expected[name])
    }


def bits(array):
    array = np.asarray(array)
    return str(array.dtype), array.shape, array.tobytes()


@pytest.mark.parametrize("kind", list(kinds()))
def test_all_comes_back_in_a_model_of_every_kind(kind, tmp_path):
    expected, end = train_through(kind, tmp_path)
    assert differing(expected[BETWEEN], expected[WITHIN])

    ours = stepsave.BackupAndRestore(tmp_path / BETWEEN)
    begun = begin_again(kind, ours, BETWEEN, tmp_path)
    leave(ours)
    assert not differing(begun, expected[BETWEEN])
    if kind.keras_takes_it:
        stock = keras.callbacks.BackupAndRestore(str(tmp_path / "stock's"))
        theirs = begin_again(kind, stock, BETWEEN, tmp_path)
        assert theirs.keys() <= begun.keys()

    ours = stepsave.BackupAndRestore(tmp_path / WITHIN)
    begun, ended = go_on(kind, ours, WITHIN, tmp_path)
    assert not differing(begun, expected[WITHIN])
    assert not differing(ended, end)
