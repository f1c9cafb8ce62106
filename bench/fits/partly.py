"""Models of which a part changes between two saves. Imports Keras: set `KERAS_BACKEND` first."""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np

from bench.fits import workload
from bench.fits.workload import LAYERS, Workload

FROZEN = 0.95  # of the state, where adapters are trained
ADAM = 3  # arrays per trained weight
ROW_VALUES = 128
IDS = 256  # of the table, per example


def adapters(megabytes: float, variables: int) -> Workload:
    """Dense layers whose kernels are frozen, each with a low-rank adapter, by Keras's LoRA."""
    width = max(1, round(math.sqrt(FROZEN * megabytes * 1e6 / 4 / LAYERS)))
    # Two matrices of `width * rank` with their slots are what is left of the state.
    rank = max(1, round((1 - FROZEN) / FROZEN * width / (2 * ADAM)))
    keras.utils.set_random_seed(0)
    inputs = outputs = keras.layers.Input((width,))
    for number in range(LAYERS):
        dense = keras.layers.Dense(width, "tanh", use_bias=False, name=f"dense_{number}")
        outputs = dense(outputs)
        dense.enable_lora(rank)
    model = keras.Model(inputs, outputs, name="bench")
    model.compile(optimizer=keras.optimizers.Adam(1e-4, name="adam"), loss="mse")
    return Workload(model, width, megabytes, variables)


class Table(Workload):
    """An embedding table whose rows are asked for by Zipf's law: the first ones most."""

    def make_data(self, batch_size: int, steps: int) -> None:
        rng = np.random.default_rng(1)
        rows = self.model.get_layer("table").input_dim
        weights = 1 / np.arange(1, rows + 1)
        shape = (batch_size * steps, IDS)
        self.batch_size = batch_size
        self.x = rng.choice(rows, shape, p=weights / weights.sum()).astype(np.int32)
        self.y = rng.standard_normal((batch_size * steps, 1), np.float32)


def embeddings(megabytes: float, variables: int) -> Workload:
    """A table with Adagrad, which leaves rows alone that no batch has asked for.

    Adam would go on moving each row that it has ever moved.
    """
    rows = max(IDS, round(megabytes * 1e6 / 4 / ROW_VALUES / 2))  # the table and its slot
    keras.utils.set_random_seed(0)
    inputs = keras.layers.Input((IDS,), dtype="int32")
    found = keras.layers.Embedding(rows, ROW_VALUES, name="table")(inputs)
    outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(found))
    model = keras.Model(inputs, outputs, name="bench")
    model.compile(optimizer=keras.optimizers.Adagrad(1e-2, name="adagrad"), loss="mse")
    return Table(model, IDS, megabytes, variables)


BUILDERS: dict[str, Callable[[float, int], Workload]] = {
    "everything": workload.build,
    "adapters": adapters,
    "embeddings": embeddings,
}
