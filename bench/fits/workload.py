"""The model that is trained: a stack of Dense layers with Adam, of an asked state size.

Imports Keras: set `KERAS_BACKEND` first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from bench.fits.probe import Probe, device_sync

LAYERS = 25  # trainable; each has a weight and two Adam slots
FROZEN_PER_LAYER = 100
CALIBRATION_STEPS = 10
LEAST_BATCH = 8
MAX_DATA_BYTES = 1_000_000_000


class Frozen(keras.layers.Layer):
    """Weights that are saved but not trained: many variables, without minutes of compiling."""

    def __init__(self, count: int, width: int, name: str) -> None:
        super().__init__(name=name)
        initializer = keras.initializers.RandomNormal()
        for number in range(count):
            self.add_weight(
                shape=(width, width),
                initializer=initializer,
                trainable=False,
                name=f"frozen_{number}",
            )

    def call(self, inputs: Any) -> Any:
        return inputs


@dataclasses.dataclass(slots=True)
class Workload:
    """A model with its data, and what was found out about it."""

    model: Any
    width: int
    megabytes: float
    variables: int
    batch_size: int = 0
    step_s: float = math.nan
    x: Any = None
    y: Any = None

    @property
    def state_bytes(self) -> int:
        return sum(value.nbytes for value in snapshot(self.model).values())

    def make_data(self, batch_size: int, steps: int) -> None:
        rng = np.random.default_rng(1)
        shape = (batch_size * steps, self.width)
        self.batch_size = batch_size
        self.x = rng.standard_normal(shape, np.float32)
        self.y = rng.standard_normal(shape, np.float32)

    def fit(self, callbacks: Any, steps: int) -> None:
        """One epoch of so many steps; everything else as Keras has it by default."""
        rows = self.batch_size * steps
        self.model.fit(
            self.x[:rows],
            self.y[:rows],
            batch_size=self.batch_size,
            epochs=1,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )


def build(megabytes: float, variables: int) -> Workload:
    """Makes the model: its whole state has about so many arrays of equal size, in sum so big."""
    width = max(1, round(math.sqrt(megabytes * 1e6 / 4 / variables)))
    layers = max(1, min(LAYERS, variables // 3))
    keras.utils.set_random_seed(0)
    inputs = outputs = keras.layers.Input((width,))
    for number in range(layers):
        dense = keras.layers.Dense(width, "tanh", use_bias=False, name=f"dense_{number}")
        outputs = dense(outputs)
    for begin in range(3 * layers, variables, FROZEN_PER_LAYER):
        count = min(FROZEN_PER_LAYER, variables - begin)
        outputs = Frozen(count, width, name=f"frozen_{begin}")(outputs)
    model = keras.Model(inputs, outputs, name="bench")
    model.compile(optimizer=keras.optimizers.Adam(1e-4, name="adam"), loss="mse")
    return Workload(model, width, megabytes, variables)


def prepare(workload: Workload, steps: int, step_s: float, batch_size: int | None) -> None:
    """Fits a batch size to the asked duration of a step, and warms the model up.

    The warm-up also makes Adam's slots other than zero: zeros compress, and real ones do not.
    """
    if batch_size is None:
        batch_size = _fitting_batch_size(workload, steps, step_s)
    workload.step_s = _step_s(workload, batch_size)
    workload.make_data(batch_size, steps)
    workload.fit([], steps)
    for path, value in snapshot(workload.model).items():
        if not np.isfinite(value).all():
            raise RuntimeError(f"The training diverged: {path} is not finite.")


def _fitting_batch_size(workload: Workload, steps: int, step_s: float) -> int:
    """The batch size with which a step takes so long; the least tried if all take longer."""
    largest = MAX_DATA_BYTES // (8 * steps * workload.width)
    size, duration_s = LEAST_BATCH, _step_s(workload, LEAST_BATCH)
    while duration_s < step_s and size < largest:
        next_size = min(4 * size, largest)
        next_s = _step_s(workload, next_size)
        if next_s > step_s:
            share = (step_s - duration_s) / (next_s - duration_s)
            return round(size + share * (next_size - size))
        size, duration_s = next_size, next_s
    return size


def _step_s(workload: Workload, batch_size: int) -> float:
    """Duration of one step, with a device sync before each; the first ones compile."""
    workload.make_data(batch_size, CALIBRATION_STEPS)
    workload.fit([], CALIBRATION_STEPS)
    probe = Probe(sync_each_step=True)
    workload.fit([probe], CALIBRATION_STEPS)
    durations = np.diff(probe.begins_s)
    return float(np.median(durations))


def snapshot(model: Any) -> dict[tuple[str, ...], np.ndarray]:
    """All values of a model as NumPy arrays, by path: what a backup is compared with."""
    device_sync(model)
    return by_path(model.get_state_tree("numpy_array"))


def by_path(tree: Mapping[str, Any], at: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of nested dicts."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        path = (*at, key)
        found |= by_path(value, path) if isinstance(value, Mapping) else {path: value}
    return found
