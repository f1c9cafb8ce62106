"""A Keras model's variables as leaves of a state, and back."""

from __future__ import annotations

import collections
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from stepsave.errors import BackupMismatchError, ChangedTrainingWarning
from stepsave.fit import keras_internals
from stepsave.fit.keras_internals import is_built
from stepsave.fit.matching import COLLECTIONS, Pair, fit_value, is_metric, match
from stepsave.fit.saveables import SAVEABLES, OwnState, Saveables
from stepsave.format.tree import flatten
from stepsave.snapshot.arrays import SavedArray
from stepsave.snapshot.leaves import assign, holds, settle
from stepsave.snapshot.pages import trim_heap

__all__ = ("ModelVariables", "Restored", "prepare_model", "restore_variables")

_MAX_LISTED = 20  # variables that an error text lists

_TRIM_BYTES = 128 << 20
"""How much memory of replaced values may stay with the C library meanwhile."""

_COMPILING_BYTES = 32 << 20
"""How much of one shape there must be for compiling a copy (20 ms) to pay: new memory comes at
one to two GB/s where a virtual machine's host makes it present, and twice as much is needed."""


class ModelVariables:
    """The variables of a model at one time, with the paths under which they are saved.

    Attributes:
        paths: Path of each variable in the state: collection, then the keys of its path.
        variables: The Keras variables.
        below: The objects below the model; their variables are the last ones.
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
        self.below = Saveables(model, self.variables)
        self.paths += self.below.paths
        self.variables += self.below.variables

    @property
    def by_path(self) -> dict[tuple[str, ...], Any]:
        return dict(zip(self.paths, self.variables, strict=True))

    @property
    def optional(self) -> set[tuple[str, ...]]:
        """Paths below the model that a backup may lack: of new metrics, and states of RNNs."""
        below = zip(self.below.paths, self.below.kinds, strict=True)
        return {path for path, kind in below if kind in ("metric", "state")}

    def is_current(self) -> bool:
        """Whether the model still has as many variables: Keras makes some only when used."""
        counts = [len(_collection(self._model, collection)) for collection in COLLECTIONS]
        return counts == self._counts and self.below.are_current()

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
        return values + [variable.value for variable in self.below.variables]


def prepare_model(
    model: Any,
    build_config: Mapping[str, Any] | None,
    batch_spec: Callable[[], Any] | None = None,
) -> None:
    """Makes the variables exist that a backup is to be restored into.

    Args:
        model: A compiled model.
        build_config: What `get_build_config` said of the model that was saved.
        batch_spec: Returns the specification of the batches that `fit` was given, on TensorFlow.

    Raises:
        BackupMismatchError: If the model is not built and cannot be.
    """
    by_step = batch_spec if keras.backend.backend() == "tensorflow" else None
    if by_step is not None and not is_built(model):
        _build_by_step(model, by_step)
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
    optimizer = getattr(model, "optimizer", None)  # none before `compile`
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    if by_step is not None and Saveables(model, ()).unbuilt_optimizers:
        _build_by_step(model, by_step)


def _build_by_step(model: Any, batch_spec: Callable[[], Any]) -> None:
    # Keras on TensorFlow builds in the first step, on other backends before `fit` begins.
    try:
        keras_internals.trace_training(model, batch_spec())
    except Exception as e:
        raise BackupMismatchError(
            f"Model {model.name!r} is not built, and building it by its training step failed: "
            f"{type(e).__name__}: {e}. Call it on a batch of data before `fit`."
        ) from e


class Restored:
    """Values that were assigned to a model's variables, to be assigned once more.

    Between the begin of `fit` and its first batch other callbacks may change variables, such
    as the learning rate, that a training which was not interrupted would not change there.
    """

    def __init__(
        self,
        model: Any,
        state: Mapping[str, Any],
        saved_backend: str | None,
        own_state: OwnState | None,
    ) -> None:
        self._model = model
        self._state = state
        self._backend = saved_backend
        self._own_state = own_state
        self._assigned: list[tuple[Any, SavedArray, Any]] = []

    @property
    def lacks_metrics(self) -> bool:
        """Whether the backup has metrics without a variable: Keras may make it in a step."""
        known = {id(variable) for variable, _, _ in self._assigned}
        saved = [path for path in flatten(self._state)[0] if is_metric(path)]
        return len(saved) > sum(id(v) in known for v in self._model.metrics_variables)

    def note(self, variables: Sequence[Any], values: Sequence[SavedArray]) -> None:
        for variable, value in zip(variables, values, strict=True):
            self._assigned.append((variable, value, _mark(variable.value)))

    def forget(self) -> None:
        """Lets go of the values, which are a copy of the state on the host."""
        self._assigned.clear()
        self._state = {}
        self._own_state = None

    def assign_again(self) -> None:
        """Assigns what was changed since, and metrics that did not exist then; then forgets."""
        for variable, value, mark in self._assigned:
            is_same = holds(variable, value) if mark is None else _mark(variable.value) == mark
            if not is_same:
                assign(variable, value)
        known = {id(variable) for variable, _, _ in self._assigned}
        now = ModelVariables(self._model)
        pairs = _match(now, self._state)[0]
        for variable, _, array in pairs:
            if id(variable) not in known:
                value, _ = fit_value(variable, array, self._backend)
                if value is not None:
                    assign(variable, value)
        now.below.tell(self._own_state or ((), ()))
        self._warn_of_new_metrics(now, {id(variable) for variable, _, _ in pairs})
        self.forget()

    def _warn_of_new_metrics(self, now: ModelVariables, restored: set[int]) -> None:
        new = [
            path[1]
            for path, variable in now.by_path.items()
            if is_metric(path) and id(variable) not in restored
        ]
        if new:
            warnings.warn(
                f"The backup has nothing for {', '.join(dict.fromkeys(new))}: new metrics count "
                "only what is left of this epoch.",
                ChangedTrainingWarning,
                stacklevel=2,
            )


def _match(now: ModelVariables, state: Mapping[str, Any]) -> tuple[list[Pair], list[str]]:
    paths, arrays = flatten(state)
    saved = dict(zip(paths, arrays, strict=True))
    unbuilt = now.below.unbuilt_optimizers
    return match(now.by_path, saved, optional=now.optional, unbuilt=unbuilt)


def _warn_of_unbuilt(now: ModelVariables, state: Mapping[str, Any]) -> None:
    counts = collections.Counter(path[:-1] for path in flatten(state)[0])
    for at in sorted(now.below.unbuilt_optimizers):
        if counts[at] > sum(path[:-1] == at for path in now.below.paths):
            name = "/".join(at[len(SAVEABLES) :])
            warnings.warn(
                f"The model's optimizer {name!r} is not built yet: its slots in the backup are "
                "not restored, and begin anew. Call its `build(variables)` before `fit`.",
                stacklevel=2,
            )


def _mark(value: Any) -> Any:
    """Something equal as long as a variable's value was not changed; None if nothing is."""
    backend = keras.backend.backend()
    if backend == "jax":
        return id(value)  # immutable; kept alive by the variable as long as it is its value
    if backend == "torch":
        return id(value), value._version  # noqa: SLF001  counts changes in place
    return None


def restore_variables(
    model: Any,
    state: Mapping[str, Any],
    saved_backend: str | None,
    own_state: OwnState | None = None,
) -> Restored:
    """Assigns a saved state to a model's variables: all of them, or none if it does not fit.

    An interrupt, or a device without room, has the rest assigned before it is raised.

    Variables are matched by path. Names that Keras numbered (`dense_3`) may carry other
    numbers than in the process that saved, as long as all else fits.

    Args:
        model: A built model.
        state: The state that was saved.
        saved_backend: Keras backend that it was saved on. Integers may have another width
            on another backend; values that do not fit are refused.
        own_state: What objects below the model stored in a way of their own.

    Returns:
        What was assigned, to be assigned again if need be.

    Raises:
        BackupMismatchError: If the backup does not fit; the model is then untouched.
    """
    now = ModelVariables(model)
    pairs, problems = _match(now, state)
    values: list[SavedArray] = []
    for variable, path, array in pairs:
        value, problem = fit_value(variable, array, saved_backend)
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
    _warn_of_unbuilt(now, state)
    variables = [variable for variable, _, _ in pairs]
    _assign_all(now, variables, values, own_state or ((), ()))
    restored = Restored(model, state, saved_backend, own_state)
    restored.note(variables, values)
    return restored


def _assign_all(
    now: ModelVariables,
    variables: Sequence[Any],
    values: Sequence[SavedArray],
    own_state: OwnState,
) -> None:
    # What would be needed to go back takes as much memory as the state, on the device too. It is
    # not kept where nothing but an interrupt comes between: then all is assigned, instead of none.
    keeps = now.below.must_be_asked
    of_form: collections.Counter[Any] = collections.Counter()
    for value in values:
        of_form[value.shape, value.dtype] += _size_bytes(value)
    before: list[Any] = []
    arrays: list[Any] = []
    try:
        own_before = now.below.ask(arrays)
    except Exception:  # noqa: BLE001  an object without its state yet has nothing to be put back
        own_before = []
    try:
        left_bytes = 0  # that replaced values may have left behind
        for variable, value in zip(variables, values, strict=True):
            if keeps:
                before.append(_keep(variable.value))
            is_worthwhile = of_form[value.shape, value.dtype] >= _COMPILING_BYTES
            if assign(variable, value, may_compile=is_worthwhile):
                left_bytes += _size_bytes(value)
            if left_bytes > _TRIM_BYTES:
                settle(variable)  # else copies would queue up before the backend takes them
                trim_heap()
                left_bytes = 0
        now.below.tell(own_state)
    except BaseException:  # out of device memory, an interrupt: no partial assignment
        if keeps:
            for variable, old in zip(variables, before, strict=False):
                variable.assign(old)
            now.below.tell((own_before, arrays))
        else:
            _complete(now, variables, values, own_state)
        raise


def _size_bytes(value: SavedArray) -> int:
    return math.prod(value.shape) * value.dtype.itemsize


def _complete(
    now: ModelVariables,
    variables: Sequence[Any],
    values: Sequence[SavedArray],
    own_state: OwnState,
) -> None:
    try:
        for variable, value in zip(variables, values, strict=True):
            assign(variable, value)
        now.below.tell(own_state)
    except BaseException as e:
        e.add_note(
            "A part of the model has the values of the backup now, the rest has those from before. "
            "Make it anew before it is trained or restored again; the backup is whole."
        )
        raise


def _keep(value: Any) -> Any:
    """A value that a later assignment leaves alone: JAX and TensorFlow make new ones."""
    backend = keras.backend.backend()
    if backend == "jax":
        return value
    if backend == "tensorflow":
        return value.read_value() if hasattr(value, "read_value") else value
    return np.array(keras.ops.convert_to_numpy(value))


def _collection(model: Any, name: str) -> list[Any]:
    if name == "optimizer_variables":
        optimizer = getattr(model, "optimizer", None)  # none before `compile`
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
