"""Models of every kind that Keras users train, small: what a backup must bring back is in them.

Each function makes one, compiled, with the data to train it on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

BACKEND = keras.backend.backend()
ALL = ("jax", "tensorflow", "torch")
BATCH = 2
SAMPLES = 8
_random = np.random.default_rng(3)
X = _random.normal(size=(SAMPLES, 4)).astype("float32")
Y = X[:, :1] - X[:, 1:2]
SEQUENCES = _random.normal(size=(SAMPLES, 3, 4)).astype("float32")
TOKENS = _random.integers(0, 9, (SAMPLES, 4)).astype("int32")
IMAGES = _random.random((SAMPLES, 6, 6, 3)).astype("float32")


@dataclasses.dataclass
class Specimen:
    """A compiled model, and what it is trained on."""

    model: Any
    x: Any = dataclasses.field(default_factory=lambda: X)
    y: Any = dataclasses.field(default_factory=lambda: Y)
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Kind:
    """How to make a specimen.

    Attributes:
        make: Makes it; is told whether it is for the second process, whose data may differ.
        backends: Where there is such a thing.
        keras_takes_it: Whether Keras's own callback does.
    """

    make: Callable[[bool], Specimen]
    backends: tuple[str, ...]
    keras_takes_it: bool


ZOO: dict[str, Kind] = {}


def kind(name, *, backends=ALL, keras_takes_it=True):
    def add(make):
        assert name not in ZOO
        takes_flag = "again" in make.__code__.co_varnames[: make.__code__.co_argcount]
        ZOO[name] = Kind(make if takes_flag else lambda _: make(), tuple(backends), keras_takes_it)
        return make

    return add


def sequential(*inner, shape=(4,), build=True):
    return keras.Sequential([*([keras.Input(shape)] if build else []), *inner])


def compiled(model, optimizer="adam", loss="mse", **kwargs):
    """A specimen of a model, by default with the arguments of many."""
    fields = {name: kwargs.pop(name) for name in ("x", "y", "fit") if name in kwargs}
    model.compile(optimizer, loss, **kwargs)
    return Specimen(model, **fields)


# Ways to put a model together.


@kind("sequential")
def _():
    return compiled(sequential(layers.Dense(3, "tanh"), layers.Dense(1)))


@kind("sequential without Input", keras_takes_it=BACKEND != "tensorflow")
def _():
    return compiled(sequential(layers.Dense(3, "tanh"), layers.Dense(1), build=False))


@kind("several inputs and outputs, by name")
def _():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((1,), name="b")}
    x = layers.Concatenate()([layers.Dense(3)(inputs["a"]), inputs["b"]])
    outputs = {
        "p": layers.Dense(1, name="p")(x),
        "q": layers.Dense(1, "sigmoid", name="q")(x),
    }
    return compiled(
        keras.Model(inputs, outputs),
        loss={"p": "mse", "q": "binary_crossentropy"},
        loss_weights={"p": 0.3, "q": 0.7},
        metrics={"p": ["mae"], "q": [keras.metrics.AUC(num_thresholds=5)]},
        weighted_metrics={"q": ["accuracy"]},
        x={"a": X, "b": Y},
        y={"p": Y, "q": (Y > 0).astype("float32")},
        fit={"sample_weight": {"p": np.linspace(0, 1, SAMPLES), "q": np.linspace(1, 2, SAMPLES)}},
    )


@kind("several inputs and outputs, in lists")
def _():
    a, b = keras.Input((4,)), keras.Input((1,))
    x = layers.Concatenate()([layers.Dense(3)(a), b])
    model = keras.Model([a, b], [layers.Dense(1)(x), layers.Dense(1)(x)])
    return compiled(model, loss=["mse", "mae"], metrics=[["mae"], ["mse"]], x=[X, Y], y=[Y, -Y])


@kind("classes with weights")
def _():
    model = sequential(layers.Dense(3, "tanh"), layers.Dense(2, "softmax"))
    return compiled(
        model,
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(1)],
        weighted_metrics=["accuracy", keras.metrics.SparseCategoricalCrossentropy()],
        y=(Y[:, 0] > 0).astype("int32"),
        fit={"class_weight": {0: 0.3, 1: 2.0}},
    )


class Body(keras.Model):
    """A model in a model, with another one within."""

    def __init__(self):
        super().__init__()
        self.inner = sequential(layers.Dense(4), layers.BatchNormalization())
        self.tower = [layers.Dense(4), (layers.Dense(4), {"last": layers.Dense(3)})]

    def call(self, x, training=False):
        x = self.inner(x, training=training)
        first, (second, named) = self.tower
        return named["last"](second(first(x)))


@kind("nested")
def _():
    inputs = keras.Input((4,))
    x = sequential(layers.Dense(4, "tanh"), sequential(layers.Dense(4)))(inputs)
    return compiled(keras.Model(inputs, layers.Dense(1)(Body()(x))))


@kind("shared layers")
def _():
    a, b = keras.Input((4,)), keras.Input((4,))
    shared = layers.Dense(3, "tanh")
    left = sequential(shared, layers.Dense(2))
    right = sequential(shared, layers.Dense(2))
    x = layers.Concatenate()([left(a), right(b), shared(a)])
    return compiled(keras.Model([a, b], layers.Dense(1)(x)), x=[X, -X])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(3, "tanh"), layers.BatchNormalization()]
        self.by_name = {"drop": layers.Dropout(0.3), "out": layers.Dense(1)}

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x)
        return self.by_name["out"](self.by_name["drop"](x, training=training))


@kind("subclassed, called before")
def _():
    model = Subclassed()
    model(X[:BATCH])
    return compiled(model)


@kind("subclassed, unbuilt", keras_takes_it=BACKEND != "tensorflow")
def _():
    return compiled(Subclassed())


class Built(Subclassed):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.steps = self.add_weight(shape=(), initializer="zeros", trainable=False, name="steps")
        self.blocks[0].build(shape)
        self.blocks[1].build((*shape[:-1], 3))
        self.by_name["out"].build((*shape[:-1], 3))
        self.built = True

    def call(self, x, training=False):
        if training:
            self.steps.assign_add(1.0)
        return super().call(x * self.scale, training=training)


@kind("subclassed with build, unbuilt", keras_takes_it=BACKEND != "tensorflow")
def _():
    return compiled(Built())


@kind("subclassed with build, built")
def _():
    model = Built()
    model.build((None, 4))
    return compiled(model)


class OwnVariables(keras.Model):
    """Keeps variables itself, as attributes and in containers, with a generator of noise."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)
        self.bias = self.add_weight(shape=(4,), initializer="zeros", name="bias")
        self.scales = [keras.Variable(np.ones(4, "float32"), name=f"scale_{i}") for i in range(2)]
        self.by_name = {"seen": keras.Variable(0.0, trainable=False, name="seen")}
        self.pair = (keras.Variable(np.ones(4, "float32")), keras.Variable([2.0], trainable=False))
        self.noise = [keras.random.SeedGenerator(1), {"more": keras.random.SeedGenerator(2)}]

    def call(self, x, training=False):
        if training:
            self.by_name["seen"].assign_add(1.0)
            self.pair[1].assign(self.pair[1] * 1.01)
            for generator in (self.noise[0], self.noise[1]["more"]):
                x = x + 0.1 * keras.random.normal(ops.shape(x), seed=generator)
        x = self.dense(x * self.scales[0]) + self.bias
        return ops.sum(x * self.scales[1] * self.pair[0] * self.pair[1], axis=-1, keepdims=True)


@kind("variables of the model's own")
def _():
    model = OwnVariables()
    model(X[:BATCH])
    return compiled(model)


@kind("frozen layers")
def _():
    frozen = sequential(layers.Dense(3), layers.BatchNormalization())
    frozen.trainable = False
    model = sequential(frozen, layers.Dense(2, trainable=False), layers.Dense(1))
    return compiled(model)


@kind("layers frozen after the optimizer was built", backends=["tensorflow", "torch"])
def _():
    model = sequential(layers.Dense(3), layers.Dense(2), layers.Dense(1))
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    model.layers[0].trainable = False
    return compiled(model, optimizer)


class Keeper(layers.Layer):
    """Saves itself in a way of its own, with a count that is no variable."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.history = np.zeros(3)

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False, name="seen")

    def call(self, x, training=False):
        if training:
            self.seen.assign_add(1.0)
        return x * self.scale

    def save_own_variables(self, store):
        store["the scale"], store["seen"] = self.scale, self.seen
        store["twice"] = 2 * ops.convert_to_numpy(self.scale)
        store["history"] = self.history

    def load_own_variables(self, store):
        self.scale.assign(store["the scale"])
        self.seen.assign(store["seen"])
        self.history = np.array(store["history"])


@kind("a layer that saves itself")
def _(again):
    keeper = Keeper()
    keeper.history = np.arange(3) * (0.0 if again else 1.5)
    return compiled(sequential(keeper, layers.Dense(1)))


# Layers with a state of their own.


@kind("batch normalization and random layers")
def _():
    return compiled(
        sequential(
            layers.Dense(6),
            layers.BatchNormalization(momentum=0.8),
            layers.Dropout(0.3, seed=5),
            layers.GaussianNoise(0.1),
            layers.GaussianDropout(0.1),
            layers.AlphaDropout(0.1),
            layers.BatchNormalization(center=False, scale=False),
            layers.Dense(1),
        )
    )


@kind("spectral normalization")
def _():
    return compiled(
        sequential(
            layers.SpectralNormalization(layers.Dense(3), power_iterations=2), layers.Dense(1)
        )
    )


@kind("convolutions")
def _():
    model = sequential(
        layers.Conv2D(4, 3, padding="same"),
        layers.BatchNormalization(),
        layers.SpatialDropout2D(0.3),
        layers.SeparableConv2D(3, 3),
        layers.GroupNormalization(3),
        layers.DepthwiseConv2D(2),
        layers.PReLU(shared_axes=[1, 2]),
        layers.GlobalAveragePooling2D(),
        layers.Dense(1),
        shape=(6, 6, 3),
    )
    return compiled(model, x=IMAGES)


@kind("attention")
def _():
    tokens = keras.Input((4,), dtype="int32")
    x = layers.Embedding(9, 4)(tokens)
    x = layers.MultiHeadAttention(2, 3, dropout=0.2)(x, x, use_causal_mask=True)
    x = layers.GroupQueryAttention(4, 2, 1)(x, x)
    x = layers.LayerNormalization()(x)
    x = layers.Dense(1)(layers.GlobalAveragePooling1D()(x))
    return compiled(keras.Model(tokens, x), x=TOKENS)


class Cell(layers.Layer):
    """A cell of a user, with a layer within."""

    def __init__(self, units):
        super().__init__()
        self.units = self.state_size = units
        self.inner = layers.Dense(units)

    def build(self, shape):
        self.recurrent = self.add_weight(shape=(self.units, self.units), name="recurrent")
        self.inner.build(shape)

    def call(self, x, states):
        out = ops.tanh(self.inner(x) + states[0] @ self.recurrent)
        return out, [out]


RECURRENT = {
    "LSTM": lambda: layers.LSTM(3, stateful=True, dropout=0.2, recurrent_dropout=0.2),
    "GRU": lambda: layers.GRU(3, stateful=True, return_sequences=False, seed=4),
    "SimpleRNN": lambda: layers.SimpleRNN(3, stateful=True),
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(3, stateful=True)),
    "custom cell": lambda: layers.RNN(Cell(3), stateful=True),
    "stacked cells": lambda: layers.RNN(
        [layers.LSTMCell(3, dropout=0.2), layers.GRUCell(2)], stateful=True
    ),
}


def recurrent(layer):
    inputs = keras.Input(batch_shape=(BATCH, 3, 4))
    x = layers.TimeDistributed(layers.Dense(4))(inputs)
    return compiled(keras.Model(inputs, layers.Dense(1)(layer(x))), x=SEQUENCES)


for name, make_layer in RECURRENT.items():
    # Keras on torch cannot train these two.
    where = ["jax", "tensorflow"] if name in ("GRU", "Bidirectional") else ALL
    kind(f"stateful {name}", backends=where)(lambda make_one=make_layer: recurrent(make_one()))


@kind("stateful ConvLSTM2D")
def _():
    inputs = keras.Input(batch_shape=(BATCH, 2, 3, 6, 3))
    x = layers.ConvLSTM2D(2, 2, stateful=True, dropout=0.2)(inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x)))
    return compiled(model, x=IMAGES.reshape(SAMPLES, 2, 3, 6, 3))
