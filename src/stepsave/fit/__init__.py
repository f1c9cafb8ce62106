"""All that knows Keras: the callback, and how it follows a `fit`."""

from __future__ import annotations

from stepsave import rng
from stepsave.fit import keras_internals

rng.hand_in_keras(keras_internals.read_global_seed, keras_internals.set_global_seed)
