"""A restored state with arrays of another kind, or in the structure of another state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from stepsave.engine.arguments import check_choices
from stepsave.engine.extents import Needs, Regions
from stepsave.engine.reader import StoredBackup
from stepsave.errors import BackupMismatchError, InvalidStateError
from stepsave.format.records import LeafSpec
from stepsave.format.tree import FlatState, flatten_state, rebuild, unflatten
from stepsave.snapshot.arrays import ArrayForm, HostArray, SavedArray
from stepsave.snapshot.leaves import (
    describe,
    make_like,
    make_tensor,
    open_leaf,
    regions_here,
    wrap_key,
)

__all__ = ("ArrayKind", "check_arrays", "needs_of", "shape_state")

ArrayKind = Literal["numpy", "torch"]

_SHOWN = 10  # differences that an error lists

_NUMBERS = {"bool": "b", "int": "iu", "float": "f", "complex": "c"}
"""Kinds of NumPy dtypes that a number of Python takes the value of, by its type."""

Path = tuple[str, ...]
Told = Mapping[Path, tuple[str, Any]]


def check_arrays(arrays: object, like: object) -> None:
    """Raises `ValueError` unless the arrays of a restored state may be of that kind."""
    check_choices(arrays=arrays)
    if like is not None and arrays != "numpy":
        raise ValueError(
            f"Invalid value for argument `arrays`. Received: arrays={arrays!r} and `like`, which "
            "says itself of what kind each array is. Pass one of the two."
        )


def shape_state(found: StoredBackup, like: Any, arrays: ArrayKind, place: str) -> Any:
    """Returns the state of a backup as `Checkpointer.restore` promises it."""
    source = f"{place}, step {found.step}"
    if like is not None:
        return fit_to(like, found.flat, source)
    return as_tensors(found.flat, source) if arrays == "torch" else found.state


def as_tensors(found: FlatState, source: str) -> Any:
    """Returns what was found in dicts, lists and tuples, its arrays as torch tensors.

    Raises:
        BackupMismatchError: If one has a dtype that torch has not.
    """
    noted = {path for path, _, _ in found.notes}  # numbers, and PRNG keys of JAX
    leaves: list[Any] = []
    for path, leaf in zip(found.paths, found.leaves, strict=True):
        try:
            leaves.append(np.asarray(leaf) if path in noted else make_tensor(leaf))
        except TypeError as e:
            raise BackupMismatchError(
                f"{source}: expected arrays that torch can hold, found {_show(leaf)} at "
                f"{'/'.join(path)!r}. Restore NumPy arrays: leave `arrays` out."
            ) from e
    return unflatten(found.paths, leaves, found.notes)


def fit_to(like: Any, found: FlatState, source: str) -> Any:
    """Returns what was found in the structure of `like`, each array of the kind that it has there.

    Arrays are matched by their paths. So lists, tuples, named tuples and dicts may stand for each
    other, and containers without arrays are those of `like`.

    Raises:
        BackupMismatchError: If paths, shapes, dtypes or kinds of PRNG keys differ, naming which.
        InvalidStateError: If `like` could not be saved itself.
    """
    wanted = flatten_state(like, open_leaf)
    arrays = dict(zip(found.paths, found.leaves, strict=True))
    noted, stored = _by_path(wanted), _by_path(found)
    problems: list[str] = []
    for path, leaf in zip(wanted.paths, wanted.leaves, strict=True):
        try:
            form = describe(leaf)
        except InvalidStateError as e:
            raise InvalidStateError(f"`like` at {'/'.join(path)!r}: {e}") from e
        difference = _difference(form, arrays.get(path), noted.get(path), stored.get(path))
        if difference:
            problems.append(f"{'/'.join(path)!r}: {difference}")
    problems += [
        f"{'/'.join(path)!r}: expected no array, found {_show(arrays[path])}"
        for path in arrays.keys() - set(wanted.paths)
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:_SHOWN])
        left = len(problems) - _SHOWN
        more = f"\n  and {left} more" if left > 0 else ""
        raise BackupMismatchError(
            f"{source}: the backup does not fit `like` in {len(problems)} place(s):\n  {shown}"
            f"{more}\nPass a state like the one that was saved, or restore without `like`."
        )
    return rebuild(like, _leaves(wanted, arrays, noted), open_leaf)


def needs_of(like: Any) -> Needs | None:
    """Returns which parts of arrays this process needs; None if it needs all of all."""
    wanted = flatten_state(like, open_leaf)
    regions = {
        path: (tuple(leaf.shape), some)
        for path, leaf in zip(wanted.paths, wanted.leaves, strict=True)
        if (some := regions_here(leaf)) is not None
    }

    def needed(leaves: Sequence[LeafSpec]) -> Regions:
        known = ((leaf, regions.get(leaf.path)) for leaf in leaves)
        return {leaf.path: one[1] for leaf, one in known if one and one[0] == leaf.shape}

    return Needs(needed) if regions else None


def _by_path(state: FlatState) -> Told:
    return {path: (kind, value) for path, kind, value in state.notes}


def _difference(
    form: ArrayForm,
    array: HostArray | None,
    noted: tuple[str, Any] | None,
    stored: tuple[str, Any] | None,
) -> str:
    """Says what differs between a leaf and the array in its place; empty if nothing does."""
    kind = noted[0] if noted else ""
    expected = f"a number of type {kind}" if kind in _NUMBERS else _show(form)
    if array is None:
        return f"expected {expected}, found {'no array' if stored is None else stored[0]}"
    if kind in _NUMBERS:
        is_same = array.shape == () and array.dtype.kind in _NUMBERS[kind]
    else:
        is_same = (array.shape, array.dtype) == (form.shape, form.dtype)
    if not is_same:
        return f"expected {expected}, found {_show(array)}"
    if kind == "prng_key" and stored is not None and stored != noted:
        return f"expected a PRNG key of {noted and noted[1]}, found one of {stored[1]}"
    return ""


def _show(array: SavedArray | ArrayForm) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _leaves(wanted: FlatState, arrays: Mapping[Path, HostArray], noted: Told) -> Iterator[Any]:
    for path, leaf in zip(wanted.paths, wanted.leaves, strict=True):
        made = make_like(arrays[path], leaf)
        kind, value = noted.get(path, ("", None))
        yield wrap_key(made, value) if kind == "prng_key" else made
