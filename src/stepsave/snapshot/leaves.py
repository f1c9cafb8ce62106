"""Leaves of a state as their backend has them: what they are, and how to make others like them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

from stepsave.errors import InvalidStateError
from stepsave.format.tree import Fields, NotedLeaf
from stepsave.snapshot.arrays import ArrayForm, HostArray, SavedArray, backend_of

__all__ = ("assign", "describe", "make_like", "open_leaf", "wrap_key")


def open_leaf(value: Any) -> NotedLeaf | Fields | None:
    """Knows the PRNG keys of JAX, and containers that are registered there; see `tree.Opener`.

    Raises:
        InvalidStateError: If a value is neither that nor an array.
    """
    backend = backend_of(value)
    if backend not in ("", "jax"):
        return None
    opened = _module("jax").open_leaf(value) if "jax" in sys.modules else None
    if opened is None and not backend:
        raise InvalidStateError(
            "expected an array, a number, None, or a container that Python has or JAX knows, found "
            f"{type(value).__name__}. Save a dict of what is in it."
        )
    return opened


def describe(leaf: Any) -> ArrayForm:
    """Returns what an array or a number is on the host, without a transfer.

    Raises:
        InvalidStateError: If it is something else.
    """
    backend = backend_of(leaf)
    if backend == "keras":
        return describe(leaf.value)
    if backend == "numpy":
        return ArrayForm(np.shape(leaf), np.asarray(leaf).dtype)
    if not backend:
        raise InvalidStateError(f"expected an array or a number, found {type(leaf).__name__}.")
    return ArrayForm(*_module(backend).describe([leaf])[0])


def make_like(array: HostArray, like: Any) -> Any:
    """Returns the values of an array as what another leaf is, where that one is.

    Args:
        array: Of the shape and dtype of `like`.
        like: A leaf that `describe` knows. Of a Keras variable, its value counts.
    """
    backend = backend_of(like)
    if backend == "keras":
        return make_like(array, like.value)
    if backend != "numpy":
        return _module(backend).make_like(array, like)
    if isinstance(like, np.ndarray):
        return array
    return array[()] if isinstance(like, np.generic) else type(like)(array.item())


def assign(variable: Any, array: SavedArray) -> None:
    """Gives a Keras variable the values of an array of its shape and dtype, and shares no memory.

    On torch nothing is allocated for that.
    """
    value = variable.value
    backend = backend_of(value)
    if backend == "torch":
        _module("torch").overwrite(value, array)
    elif backend == "jax":  # assigned as it is, it would be shared if it happens to be aligned
        variable.assign(make_like(np.asarray(array), value))
    else:
        variable.assign(np.asarray(array))


def wrap_key(data: Any, implementation: str) -> Any:
    """Returns a typed PRNG key of JAX, of its data."""
    return _module("jax").wrap_key(data, implementation)


def _module(backend: str) -> Any:
    """The module here that knows a backend; imports that backend, whose leaf is there already."""
    return importlib.import_module(f"stepsave.snapshot.{backend}")
