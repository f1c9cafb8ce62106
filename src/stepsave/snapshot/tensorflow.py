"""TensorFlow tensors and variables on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import tensorflow as tf

from stepsave.errors import InvalidStateError

__all__ = ("view_on_host",)


def view_on_host(leaves: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Returns tensors, and the present values of variables, as NumPy arrays.

    `Tensor.numpy()` copies; the buffer protocol does not. A variable's value stays intact
    while it is held: TensorFlow copies a variable whose value is shared before it assigns.
    """
    return [_view(leaf) for leaf in leaves]


def _view(leaf: Any) -> np.ndarray[Any, Any]:
    tensor: Any = leaf.read_value() if isinstance(leaf, tf.Variable) else leaf
    if not isinstance(tensor, tf.Tensor) or not hasattr(tensor, "numpy"):
        raise InvalidStateError(f"expected an eager tensor, found {type(leaf).__name__}.")
    if "GPU" in tensor.device:
        return np.asarray(tensor.numpy())
    try:
        return np.asarray(memoryview(cast("Any", tensor)))
    except (TypeError, ValueError):  # bfloat16 and float8 have no buffer format
        return np.asarray(tensor.numpy())
