"""A Keras model's variables as leaves of a state, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from stepsave.errors import BackupMismatchError
from stepsave.fit import keras_internals
from stepsave.format.tree import flatten
from stepsave.snapshot.arrays import HostArray

__all__ = ("ModelVariables", "Restored", "prepare_model", "restore_variables")

COLLECTIONS = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)
"""As in `keras.Model.get_state_tree`, and in the order of JAX's training state."""

_MAX_LISTED = 20  # variables that an error text lists


class ModelVariables:
    """The variables of a model at one time, with the paths under which they are saved.

    Attributes:
        paths: Path of each variable in the state: collection, then the keys of its path.
        variables: The Keras variables.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.paths: list[tuple[str, ...]] = []
        self.variables: list[Any] = []
        self._counts: list[int] = []
        for collection in COLLECTIONS:
            variables = _collection(model, collection)
            self._counts.append(len(variables))
            self.variables += variables
            paths = _unique_paths([variable.path for variable in variables])
            self.paths += [(collection, *path) for path in paths]

    def is_current(self) -> bool:
        """Whether the model still has as many variables: Keras makes some only when used."""
        counts = [len(_collection(self._model, collection)) for collection in COLLECTIONS]
        return counts == self._counts

    def values(self) -> list[Any]:
        """The present values as arrays of the backend, in the order of `paths`.

        On JAX the values during an epoch are not in the variables: a variable read then
        returns a fresh sample of its initializer. They are in the trainer's state, which
        the public `jax_state_sync` puts back into the variables, at a price per step.
        """
        model = self._model
        state = keras_internals.jax_state(model)
        if state is None:
            return [variable.value for variable in self.variables]
        values: list[Any] = []
        for collection, count in zip(COLLECTIONS, self._counts, strict=True):
            part = state.get(collection)
            if part is None or len(part) != count:  # not the Keras that this was written for
                model.jax_state_sync()
                return [variable.value for variable in self.variables]
            values += part
        return values


def prepare_model(model: Any, build_config: Mapping[str, Any] | None) -> None:
    """Makes the variables exist that a backup is to be restored into.

    Args:
        model: A compiled model.
        build_config: What `get_build_config` said of the model that was saved.

    Raises:
        BackupMismatchError: If the model is not built and cannot be.
    """
    if not model.built and build_config:
        try:
            model.build_from_config(dict(build_config))
        except Exception as e:
            raise BackupMismatchError(
                f"Model {model.name!r} is not built, and building it as in the backup "
                f"({build_config}) failed: {e}. Call it on a batch of data before `fit`."
            ) from e
    if not model.built:
        raise BackupMismatchError(
            f"Model {model.name!r} is not built, and the backup does not say how. Call it on "
            "a batch of data before `fit`."
        )
    optimizer = model.optimizer
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)


class Restored:
    """Values that were assigned to a model's variables, to be assigned once more.

    Between the begin of `fit` and its first batch other callbacks may change variables, such
    as the learning rate, that a training which was not interrupted would not change there.
    """

    def __init__(self, model: Any, state: Mapping[str, Any], saved_backend: str | None) -> None:
        self._model = model
        self._state = state
        self._backend = saved_backend
        self._assigned: list[tuple[Any, HostArray, Any]] = []

    def note(self, variables: Sequence[Any], values: Sequence[HostArray]) -> None:
        for variable, value in zip(variables, values, strict=True):
            self._assigned.append((variable, value, _mark(variable.value)))

    def forget(self) -> None:
        """Lets go of the values, which are a copy of the state on the host."""
        self._assigned.clear()
        self._state = {}

    def assign_again(self) -> None:
        """Assigns what was changed since, and metrics that did not exist then; then forgets."""
        for variable, value, mark in self._assigned:
            if mark is None or _mark(variable.value) != mark:
                variable.assign(value)
        known = {id(variable) for variable, _, _ in self._assigned}
        now = ModelVariables(self._model)
        is_known = all(id(variable) in known for variable in now.variables)
        pairs = [] if is_known else _match(now, *flatten(self._state))[0]
        for variable, _, array in pairs:
            if id(variable) not in known:
                value, _ = _fit_value(variable, array, self._backend)
                if value is not None:
                    variable.assign(value)
        self.forget()


def _mark(value: Any) -> Any:
    """Something equal as long as a variable's value was not changed; None if nobody can tell."""
    backend = keras.backend.backend()
    if backend == "jax":
        return id(value)  # immutable; kept alive by the variable as long as it is its value
    if backend == "torch":
        return id(value), value._version  # noqa: SLF001  counts changes in place
    return None


def restore_variables(model: Any, state: Mapping[str, Any], saved_backend: str | None) -> Restored:
    """Assigns a saved state to a model's variables: all of them, or none.

    Variables are matched by path. Names that Keras numbered (`dense_3`) may carry other
    numbers than in the process that saved, as long as all else fits.

    Args:
        model: A built model.
        state: The state that was saved.
        saved_backend: Keras backend that it was saved on. Integers may have another width
            on another backend; values that do not fit are refused.

    Returns:
        What was assigned, to be assigned again if need be.

    Raises:
        BackupMismatchError: If the backup does not fit; the model is then untouched.
    """
    now = ModelVariables(model)
    paths, arrays = flatten(state)
    pairs, problems = _match(now, paths, arrays)
    values: list[HostArray] = []
    for variable, path, array in pairs:
        value, problem = _fit_value(variable, array, saved_backend)
        if value is None:
            problems.append(f"{'/'.join(path)}: {problem}")
        else:
            values.append(value)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:_MAX_LISTED])
        more = len(problems) - _MAX_LISTED
        raise BackupMismatchError(
            f"The backup does not fit model {model.name!r}:\n{listed}"
            + (f"\n  … and {more} more" if more > 0 else "")
            + "\nThe model was not changed. Build and compile it as it was when the backup was "
            "made, or use another `backup_dir`."
        )
    variables = [variable for variable, _, _ in pairs]
    _assign_all(variables, values)
    restored = Restored(model, state, saved_backend)
    restored.note(variables, values)
    return restored


def _assign_all(variables: Sequence[Any], values: Sequence[HostArray]) -> None:
    before: list[Any] = []
    try:
        for variable, value in zip(variables, values, strict=True):
            before.append(_keep(variable.value))
            variable.assign(value)
    except BaseException:  # out of device memory, an interrupt: no partial assignment, ever
        for variable, old in zip(variables, before, strict=False):
            variable.assign(old)
        raise


def _keep(value: Any) -> Any:
    """A value that a later assignment leaves alone: JAX and TensorFlow make new ones."""
    backend = keras.backend.backend()
    if backend == "jax":
        return value
    if backend == "tensorflow":
        return value.read_value() if hasattr(value, "read_value") else value
    return np.array(keras.ops.convert_to_numpy(value))


Pair = tuple[Any, tuple[str, ...], HostArray]


def _match(
    now: ModelVariables, paths: Sequence[tuple[str, ...]], arrays: Sequence[HostArray]
) -> tuple[list[Pair], list[str]]:
    """Pairs variables with saved arrays; what has no partner is described as a problem."""
    saved = dict(zip(paths, arrays, strict=True))
    pairs: list[Pair] = []
    problems: list[str] = []
    for collection in COLLECTIONS:
        mine = {
            path: variable
            for path, variable in zip(now.paths, now.variables, strict=True)
            if path[0] == collection
        }
        theirs = [path for path in paths if path[0] == collection]
        partners = _partners(list(mine), theirs)
        pairs += [(mine[path], path, saved[partner]) for path, partner in partners.items()]
        if collection == "metrics_variables" and keras.backend.backend() == "tensorflow":
            # Keras on TensorFlow makes most metrics in the first step; `fit` resets all
            # metrics when an epoch begins, so nothing is lost.
            continue
        problems += [
            f"{'/'.join(path)}: expected by the model, {_describe(variable)}; not in the backup"
            for path, variable in mine.items()
            if path not in partners
        ]
        for path in sorted(set(theirs) - set(partners.values())):
            array = saved[path]
            problems.append(
                f"{'/'.join(path)}: in the backup, {array.dtype} {array.shape}; the model has "
                "no such variable"
            )
    problems += [
        f"{'/'.join(path)}: in the backup, but no variable of a Keras model"
        for path in paths
        if path[0] not in COLLECTIONS
    ]
    return pairs, problems


_NUMBER = re.compile(r"_(\d+)(?=_|/|$)")


def _partners(
    mine: Sequence[tuple[str, ...]], theirs: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Maps paths of the model to paths of the backup: equal ones, or equal but for numbers.

    Keras numbers layers by a counter of the process, so `dense_2` and `dense_5` may be the
    same layer of a model built twice. Among names that differ in nothing else the order of
    the numbers is the order of creation, in both.
    """
    if set(mine) == set(theirs):
        return {path: path for path in mine}
    mine_by_name, theirs_by_name = _by_name(mine), _by_name(theirs)
    partners: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name, group in mine_by_name.items():
        other = theirs_by_name.get(name, [])
        if len(group) == len(other):
            partners |= dict(zip(group, other, strict=True))
        else:
            partners |= {path: path for path in group if path in other}
    return partners


def _by_name(paths: Iterable[tuple[str, ...]]) -> dict[str, list[tuple[str, ...]]]:
    groups: dict[str, list[tuple[tuple[int, ...], tuple[str, ...]]]] = {}
    for path in paths:
        text = "/".join(path)
        name = _NUMBER.sub("", text)
        # No number counts as 0, as Keras counts.
        order = tuple(
            int(match[1]) if (match := _NUMBER.search(f"{part}")) else 0
            for part in re.split(r"(?<=\d)[_/]|/", text)
        )
        groups.setdefault(name, []).append((order, path))
    return {name: [path for _, path in sorted(group)] for name, group in groups.items()}


def _fit_value(
    variable: Any, array: HostArray, saved_backend: str | None
) -> tuple[HostArray | None, str]:
    dtype = keras.backend.standardize_dtype(variable.value.dtype)
    shape = tuple(variable.shape)
    found = f"{array.dtype} {array.shape}"
    problem = f"expected {dtype} {shape}, found {found} in the backup"
    if tuple(array.shape) != shape:
        return None, problem
    if str(array.dtype) == dtype:
        return array, ""
    # The width of an integer is the backend's choice: `iterations` is int64 on TensorFlow
    # and int32 elsewhere, seeds are uint32, int64 and int32.
    crosses = saved_backend is not None and saved_backend != keras.backend.backend()
    if crosses and array.dtype.kind in "iu" and dtype.lstrip("u").startswith("int"):
        limits = np.iinfo(dtype)
        if array.size == 0 or limits.min <= array.min() <= array.max() <= limits.max:
            return array.astype(dtype), ""
        return None, f"{problem}, with values that do not fit"
    return None, problem


def _collection(model: Any, name: str) -> list[Any]:
    if name == "optimizer_variables":
        optimizer = model.optimizer
        return [] if optimizer is None else list(optimizer.variables)
    return list(getattr(model, name))


def _unique_paths(paths: Sequence[str]) -> list[tuple[str, ...]]:
    """Splits paths at `/`, with a suffix where two would collide in a nested dict.

    Layers may share a name, and a variable may be called like a layer beside it.
    """
    taken: set[tuple[str, ...]] = set()
    inner: set[tuple[str, ...]] = set()
    for path in paths:
        keys = _keys(path)
        inner |= {keys[:i] for i in range(1, len(keys))}
    unique: list[tuple[str, ...]] = []
    for path in paths:
        keys = candidate = _keys(path)
        number = 1
        while candidate in taken or candidate in inner:
            number += 1
            candidate = (*keys[:-1], f"{keys[-1]}~{number}")
        taken.add(candidate)
        unique.append(candidate)
    return unique


def _keys(path: str) -> tuple[str, ...]:
    return tuple(key for key in path.split("/") if key) or ("variable",)


def _describe(variable: Any) -> str:
    return f"{variable.dtype} {tuple(variable.shape)}"
