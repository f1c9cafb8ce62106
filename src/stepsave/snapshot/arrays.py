"""Arrays of any backend on the host."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stepsave.errors import InvalidStateError
from stepsave.format.layout import is_contiguous
from stepsave.format.records import DTYPES

__all__ = (
    "ArrayForm",
    "HostArray",
    "SavedArray",
    "ScatteredArray",
    "as_bits",
    "backend_of",
    "backends_of",
    "bits_of",
    "bytes_of",
    "device_name",
    "dtype_name",
    "unwrap",
    "view_on_host",
    "wait_computed",
)

HostArray = np.ndarray[Any, Any]

# NumPy copies these dtypes with a plain loop over bytes; others go through slower code
# that also holds the GIL, so extension types are copied as unsigned integers.
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Returns the dtype by which arrays of a dtype are copied."""
    is_native = dtype.isbuiltin == 1
    return dtype if is_native else np.dtype(_BITS[dtype.itemsize])


def as_bits(array: HostArray) -> HostArray:
    """Returns an array by that dtype, in the same memory."""
    return array if array.dtype.isbuiltin == 1 else array.view(bits_of(array.dtype))


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayForm:
    """What an array on its way to the host will be there, apart from its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ScatteredArray:
    """A large array as pieces of memory; `np.asarray` puts them together in memory of its own.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        chunk_shape: Shape of the pieces; the last ones along an axis may be smaller.
        chunks: The pieces by their place in the grid; perhaps not all, where not all were wanted.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    chunks: Mapping[tuple[int, ...], HostArray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> HostArray:
        if copy is False:
            raise ValueError(
                "an array in pieces cannot be had without a copy: leave `copy=False` out"
            )
        whole = self[tuple(slice(0, size) for size in self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __getitem__(self, index: tuple[slice, ...]) -> HostArray:
        """Returns a part of it, one slice per axis; one that is a piece is not copied.

        Raises:
            KeyError: If a piece of that was not read.
        """
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, self.shape, strict=True)]
        grid = self._grid(bounds)
        part = np.empty([end - begin for begin, end in bounds], self.dtype)
        if all(len(places) == 1 for places in grid):
            chunk = self.chunks[tuple(places[0] for places in grid)]
            if chunk.shape == part.shape:
                return chunk
        for place in itertools.product(*grid):
            source: list[slice] = []
            target: list[slice] = []
            for axis, at in enumerate(place):
                begin, end = bounds[axis]
                first = at * self.chunk_shape[axis]
                low, high = max(begin, first), min(end, first + self.chunk_shape[axis])
                source.append(slice(low - first, high - first))
                target.append(slice(low - begin, high - begin))
            as_bits(part)[tuple(target)] = as_bits(self.chunks[place])[tuple(source)]
        return part

    def _grid(self, bounds: Sequence[tuple[int, int]]) -> list[range]:
        return [
            range(begin // size, -(-end // size))
            for (begin, end), size in zip(bounds, self.chunk_shape, strict=True)
        ]

    def has(self, index: Sequence[slice]) -> bool:
        """Whether all pieces of a part are there."""
        bounds = [(cut.start, cut.stop) for cut in index]
        return all(place in self.chunks for place in itertools.product(*self._grid(bounds)))

    @property
    def runs(self) -> tuple[HostArray, ...] | None:
        """The pieces, if one after the other they are all of it in C order."""
        counts = (-(-n // size) for n, size in zip(self.shape, self.chunk_shape, strict=True))
        is_all = len(self.chunks) == math.prod(counts)
        if not is_all or not is_contiguous(self.chunk_shape, self.shape):
            return None
        return tuple(self.chunks[place] for place in sorted(self.chunks))


SavedArray = HostArray | ScatteredArray
"""An array that was read from a backup."""


def bytes_of(array: SavedArray) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], ...]:
    """Returns the bytes of an array in C order, as one or several pieces of memory."""
    runs = array.runs if isinstance(array, ScatteredArray) else None
    arrays = (np.asarray(array),) if runs is None else runs
    return tuple(np.ascontiguousarray(one).reshape(-1).view(np.uint8) for one in arrays)


Viewer = Callable[[Sequence[Any]], list[HostArray]]

# Root package of an array type → the module here that knows it. A backend is imported by
# its own arrays only: saving NumPy arrays never imports JAX.
_BACKENDS = {
    "jax": "jax",
    "jaxlib": "jax",
    "torch": "torch",
    "keras": "keras",
    "tensorflow": "tensorflow",
}
_SCALARS = (bool, int, float, complex, np.generic)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_backend_by_type: dict[type, str] = {}


def view_on_host(paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> list[HostArray]:
    """Returns the leaves as NumPy arrays, without copying where memory can be shared.

    The arrays may alias memory that the next training step overwrites: copy them before
    it runs, and drop them. While a view of a JAX array lives, donating that array makes
    XLA copy it first.

    Args:
        paths: Where each leaf is in the state; for error texts.
        leaves: NumPy, JAX, torch or TensorFlow arrays, Keras variables, Python scalars.

    Raises:
        InvalidStateError: If a leaf is something else.
    """
    distinct = backends_of(leaves)
    if len(distinct) == 1:  # the usual case: one backend, one call
        return _view(distinct.pop(), paths, leaves)
    kinds = [backend_of(leaf) for leaf in leaves]
    views: list[HostArray | None] = [None] * len(leaves)
    for kind in distinct:
        chosen = [i for i, other in enumerate(kinds) if other == kind]
        some = _view(kind, [paths[i] for i in chosen], [leaves[i] for i in chosen])
        for i, view in zip(chosen, some, strict=True):
            views[i] = view
    return [view for view in views if view is not None]


def device_name(leaves: Sequence[Any]) -> str | None:
    """Returns JAX's name of the device that holds the first JAX array; None without one."""
    for leaf in leaves:
        if backend_of(leaf) == "jax":
            return importlib.import_module("stepsave.snapshot.jax").device_name(leaf)
    return None


def dtype_name(path: tuple[str, ...], array: HostArray | ArrayForm) -> str:
    """Returns the key of `records.DTYPES` for an array.

    Raises:
        InvalidStateError: If arrays of its dtype cannot be saved.
    """
    name = _NAMES.get(array.dtype)
    if name is None:
        raise InvalidStateError(
            f"State {'/'.join(path)!r}: dtype {array.dtype} cannot be saved; expected one of "
            f"{', '.join(DTYPES)}. Convert it first."
        )
    return name


def _view(kind: str, paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> list[HostArray]:
    if kind == "numpy":
        return [np.asarray(leaf) for leaf in leaves]
    if kind == "keras":
        return view_on_host(paths, [leaf.value for leaf in leaves])
    if kind:
        viewer: Viewer = importlib.import_module(f"stepsave.snapshot.{kind}").view_on_host
        try:
            return viewer(leaves)
        except InvalidStateError as e:
            if len(leaves) > 1:  # say which one
                for path, leaf in zip(paths, leaves, strict=True):
                    _view(kind, [path], [leaf])
            raise InvalidStateError(f"State {'/'.join(paths[0])!r}: {e}") from e
    raise InvalidStateError(
        f"State {'/'.join(paths[0])!r}: expected a NumPy, JAX, torch or TensorFlow array or a "
        f"number, found {type(leaves[0]).__name__}. Convert it, or put it into the metadata."
    )


def unwrap(leaves: Sequence[Any]) -> Sequence[Any]:
    """Replaces Keras variables by their present values."""
    if "keras" not in backends_of(leaves):
        return leaves
    return [leaf.value if backend_of(leaf) == "keras" else leaf for leaf in leaves]


def backends_of(leaves: Sequence[Any]) -> set[str]:
    """Returns what `backend_of` says of all leaves, without a call for each."""
    examples = dict(zip(map(type, leaves), leaves, strict=True))
    return {backend_of(leaf) for leaf in examples.values()}


def backend_of(leaf: Any) -> str:
    """Returns the name of the module here that knows a leaf, `"numpy"`, `"keras"` or `""`."""
    kind = type(leaf)
    backend = _backend_by_type.get(kind)
    if backend is None:
        backend = _backend_by_type[kind] = _find_backend(leaf)
    return backend


def _find_backend(leaf: Any) -> str:
    if isinstance(leaf, (np.ndarray, *_SCALARS)):
        return "numpy"
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(leaf, keras.Variable):
        return "keras"
    for ancestor in type(leaf).__mro__:
        backend = _BACKENDS.get(ancestor.__module__.partition(".")[0])
        if backend is not None and backend != "keras":
            return backend
    return ""


def wait_computed(leaves: Sequence[Any]) -> None:
    """Returns when the arrays have their values: what computes them may only be under way."""
    leaves = unwrap(leaves)
    for kind in backends_of(leaves) - {"numpy", ""}:
        some = [leaf for leaf in leaves if backend_of(leaf) == kind]
        importlib.import_module(f"stepsave.snapshot.{kind}").wait_computed(some)
