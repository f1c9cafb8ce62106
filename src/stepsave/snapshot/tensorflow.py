"""TensorFlow tensors and variables on the host."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from stepsave.errors import InvalidStateError
from stepsave.snapshot.arrays import SavedArray
from stepsave.snapshot.page_locks import NoPins

__all__ = (
    "describe",
    "has_room",
    "is_on_accelerator",
    "make_like",
    "make_own",
    "make_pins",
    "make_stage",
    "signature",
    "view_on_host",
    "wait_computed",
)


def view_on_host(leaves: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Returns tensors, and the present values of variables, as NumPy arrays.

    `Tensor.numpy()` copies; the buffer protocol does not. A variable's value stays intact
    while it is held: TensorFlow copies a variable whose value is shared before it assigns.
    """
    return [_view(leaf) for leaf in leaves]


def wait_computed(leaves: Sequence[Any]) -> None:
    """Returns when all that was begun on GPUs has ended; on the CPU it has."""
    if is_on_accelerator(leaves):
        tf.test.experimental.sync_devices()


def _value(leaf: Any) -> Any:
    tensor: Any = leaf.read_value() if isinstance(leaf, tf.Variable) else leaf
    if not isinstance(tensor, tf.Tensor) or not hasattr(tensor, "numpy"):
        raise InvalidStateError(
            f"expected an eager tensor, found {type(leaf).__name__}. Save outside of `tf.function`."
        )
    return tensor


def _view(leaf: Any) -> np.ndarray[Any, Any]:
    tensor = _value(leaf)
    if "GPU" in tensor.device:
        return np.asarray(tensor.numpy())
    try:
        return np.asarray(memoryview(tensor))
    except (TypeError, ValueError):  # bfloat16 and float8 have no buffer format
        return np.asarray(tensor.numpy())


def describe(leaves: Sequence[Any]) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Returns shape and dtype of each tensor as it will be on the host."""
    return [(tuple(leaf.shape), np.dtype(leaf.dtype.as_numpy_dtype)) for leaf in leaves]


signature = operator.attrgetter("shape", "dtype")
"""Of a tensor or a variable; two with the same one are described alike."""


def make_like(array: np.ndarray[Any, Any], like: Any) -> Any:
    """Returns a tensor on the same device; of a variable, a variable."""
    with tf.device(like.device):
        tensor: Any = tf.constant(array, dtype=like.dtype)
        if isinstance(like, tf.Variable):
            return tf.Variable(tensor, trainable=like.trainable)
        return tensor


def make_own(array: SavedArray, like: Any) -> Any:
    """Returns a tensor that a variable can take and update in place.

    TensorFlow has tensors share what NumPy has, and copies what is shared before it updates it.
    """
    tensor: Any = tf.convert_to_tensor(np.asarray(array))
    if "GPU" in getattr(like, "device", ""):
        return tensor
    try:
        return tf.raw_ops.DeepCopy(x=tensor)
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
        return tensor  # float8: copied by the first step that updates it


def is_on_accelerator(leaves: Sequence[Any]) -> bool:
    """Whether any tensor is on a GPU."""
    return any("GPU" in getattr(leaf, "device", "") for leaf in leaves)


def has_room(_: Sequence[Any], __: float, ___: float) -> bool:
    """False: TensorFlow does not tell how much device memory is free, so never unasked."""
    return False


def make_pins(_: Sequence[Any]) -> NoPins:
    """Makes nothing: TensorFlow transfers to memory of its own."""
    return NoPins()


def make_stage(_: object, *, on_device: bool) -> _Stage:
    """Makes what takes tensors off their devices; see `staging.Stage`."""
    return _Stage(on_device=on_device)


class _Stage:
    """Holds the present values. TensorFlow copies a value that is held before it assigns.

    So what is copied, and when, is TensorFlow's: variable by variable, in the next step. Who
    wants none of that in device memory has to wait; several threads then transfer.
    """

    def __init__(self, *, on_device: bool) -> None:
        self.on_device = on_device
        self.blocks = not on_device

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Checks only."""
        for leaf in leaves:
            _value(leaf)

    def begin(
        self, leaves: Sequence[Any], _: object, __: object
    ) -> Callable[[int], np.ndarray[Any, Any]]:
        held = [_value(leaf) for leaf in leaves]
        return lambda leaf: _view(held[leaf])

    def release(self) -> None:
        """Nothing: values are held."""

    def free(self) -> None:
        """Nothing: values are let go of when they are on the host."""

    def settle(self) -> None:
        """Nothing: no transfer writes to an arena."""
