"""Leaves of a state as their backend has them: what they are, and how to make others like them."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepsave.errors import InvalidStateError
from stepsave.format.tree import Fields, NotedLeaf
from stepsave.snapshot.arrays import ArrayForm, SavedArray, backend_of, bytes_of
from stepsave.snapshot.contents import digest

__all__ = (
    "assign",
    "describe",
    "describe_all",
    "holds",
    "make_like",
    "make_tensor",
    "open_leaf",
    "regions_here",
    "settle",
    "wrap_key",
)

Region = tuple[slice, ...]


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
        raise InvalidStateError(
            f"expected an array or a number, found {type(leaf).__name__}. Convert it."
        )
    return ArrayForm(*_module(backend).describe([leaf])[0])


def describe_all(paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> list[ArrayForm]:
    """The same of all leaves of a state.

    Raises:
        InvalidStateError: If one cannot be saved, naming which.
    """
    forms: list[ArrayForm] = []
    for path, leaf in zip(paths, leaves, strict=True):
        try:
            forms.append(describe(leaf))
        except InvalidStateError as e:
            raise InvalidStateError(f"State {'/'.join(path)!r}: {e}") from e
    return forms


def regions_here(leaf: Any) -> list[Region] | None:
    """Returns what of an array the devices of this process have; None if that is all of it."""
    backend = backend_of(leaf)
    if backend == "keras":
        return regions_here(leaf.value)
    if backend != "jax":
        return None
    return importlib.import_module("stepsave.snapshot.jax_blocks").regions_here(leaf)


def make_like(array: SavedArray, like: Any) -> Any:
    """Returns the values of an array as what another leaf is, where that one is.

    Args:
        array: Of the shape and dtype of `like`.
        like: A leaf that `describe` knows. Of a Keras variable, its value counts.
    """
    backend = backend_of(like)
    if backend == "keras":
        return make_like(array, like.value)
    if backend == "jax":  # of a part of an array, where this process has no more
        return _module(backend).make_like(array, like)
    array = np.asarray(array)
    if backend != "numpy":
        return _module(backend).make_like(array, like)
    if isinstance(like, np.ndarray):
        return array
    return array[()] if isinstance(like, np.generic) else type(like)(array.item())


def make_tensor(array: SavedArray) -> Any:
    """Returns a torch tensor on the host, in memory of its own.

    Raises:
        TypeError: If torch has no such dtype.
    """
    return _module("torch").make(np.asarray(array))


def assign(variable: Any, array: SavedArray, *, may_compile: bool = False) -> bool:
    """Gives a Keras variable the values of an array of its shape and dtype, and shares no memory.

    It gets memory that a training step can update in place or donate, as it could that which the
    variable had: else the first one would take new memory for the whole state. On torch it is
    that very memory; on JAX too, on a CPU, if it may be compiled for and nobody else has it.

    Returns:
        Whether new memory was taken, and that which the variable had is left behind.
    """
    backend = backend_of(variable.value)
    module = _module(backend)
    if backend == "torch":
        module.overwrite(variable.value, array)
        return False
    is_over = may_compile and backend == "jax" and _is_alone(variable)
    if is_over and module.can_write_over(variable.value):
        variable.assign(module.write_over(array, variable.value))
        return False
    variable.assign(module.make_own(array, variable.value))
    return True


def _is_alone(variable: Any) -> bool:
    """Whether nobody but a Keras variable has its value: who else does must find it as it was."""
    alone = types.SimpleNamespace(value=object())
    return sys.getrefcount(variable.value) <= sys.getrefcount(alone.value)


def settle(variable: Any) -> None:
    """Waits until a Keras variable has what it was assigned, and no copy on the way is left."""
    value = variable.value
    if backend_of(value) == "jax":
        value.block_until_ready()


def holds(variable: Any, array: SavedArray) -> bool:
    """Whether a Keras variable has just the bits of an array of its shape and dtype."""
    value = variable.value
    (data,) = bytes_of(_module(backend_of(value)).view_on_host([value])[0])
    begin = 0
    for part in bytes_of(array):
        if digest(data[begin : begin + len(part)]) != digest(part):
            return False
        begin += len(part)
    return True


def wrap_key(data: Any, implementation: str) -> Any:
    """Returns a typed PRNG key of JAX, of its data."""
    return _module("jax").wrap_key(data, implementation)


def _module(backend: str) -> Any:
    """The module here that knows a backend; imports that backend, whose leaf is there already."""
    return importlib.import_module(f"stepsave.snapshot.{backend}")
