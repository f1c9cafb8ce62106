"""All that knows Keras: the callback, and how it follows a `fit`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from stepsave import rng
from stepsave.fit import keras_internals


def _read_global_seed() -> Any:
    seed = keras_internals.global_seed()
    return None if seed is None else np.array(keras.ops.convert_to_numpy(seed))


rng.hand_in_keras(_read_global_seed, keras_internals.set_global_seed)
