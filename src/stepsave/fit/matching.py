"""Which saved array belongs to which variable of a model, and whether it fits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import keras
import numpy as np

from stepsave.snapshot.arrays import SavedArray

__all__ = ("COLLECTIONS", "Pair", "fit_value", "is_metric", "match")

COLLECTIONS = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)
"""As in `keras.Model.get_state_tree`, and in the order of JAX's training state."""

Path = tuple[str, ...]
Pair = tuple[Any, Path, SavedArray]


def match(
    mine: Mapping[Path, Any],
    saved: Mapping[Path, SavedArray],
    *,
    optional: AbstractSet[Path],
    unbuilt: AbstractSet[Path],
) -> tuple[list[Pair], list[str]]:
    """Pairs variables with saved arrays; what has no partner is described as a problem.

    Args:
        mine: The variables of the model, by path.
        saved: The arrays of the backup, by path.
        optional: Paths of variables that begin anew where the backup does not have them.
        unbuilt: Paths of objects whose variables do not exist yet: what is saved of them is left.
    """
    pairs: list[Pair] = []
    problems: list[str] = []
    for collection in (*COLLECTIONS, _BELOW):
        ours = [path for path in mine if _collection_of(path) == collection]
        theirs = [path for path in saved if _collection_of(path) == collection]
        partners = _partners(ours, theirs)
        pairs += [(mine[path], path, saved[partner]) for path, partner in partners.items()]
        if collection == "metrics_variables":
            # `fit` resets all metrics when an epoch begins, and Keras on TensorFlow makes most of
            # them in the first step.
            continue
        problems += [
            f"{'/'.join(path)}: expected by the model, {_describe(mine[path])}; not in the backup"
            for path in ours
            if path not in partners and path not in optional
        ]
        for path in sorted(set(theirs) - set(partners.values())):
            if path[:-1] in unbuilt:
                continue
            array = saved[path]
            problems.append(
                f"{'/'.join(path)}: in the backup, {array.dtype} {array.shape}; the model has "
                "no such variable"
            )
    problems += [
        f"{'/'.join(path)}: in the backup, but no variable of a Keras model"
        for path in saved
        if path[0] not in COLLECTIONS
    ]
    return pairs, problems


_BELOW = "objects below the model"


def is_metric(path: Path) -> bool:
    """Whether a path is that of a variable of a metric of the model."""
    return _collection_of(path) == "metrics_variables"


def _collection_of(path: Path) -> str:
    return _BELOW if path[:2] == ("metrics_variables", "stepsave") else path[0]


_NUMBER = re.compile(r"_(\d+)(?=_|/|$)")


def _partners(
    mine: Sequence[tuple[str, ...]], theirs: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Maps paths of the model to paths of the backup: equal ones, or equal but for numbers.

    Keras numbers layers by a counter of the process, so `dense_2` and `dense_5` may be the
    same layer of a model built twice. Among names that differ in nothing else the order of
    the numbers is the order of creation, in both.

    What is left may differ by *when* a layer was built: a model that is built as a whole puts its
    name in front. It is matched in order, if each path is the end of its partner's.
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
    taken = set(partners.values())
    mine_left = [path for path in mine if path not in partners]
    theirs_left = [path for path in theirs if path not in taken]
    if len(mine_left) == len(theirs_left) and all(map(_differ_in_front, mine_left, theirs_left)):
        partners |= dict(zip(mine_left, theirs_left, strict=True))
    return partners


def _differ_in_front(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether one path is the end of the other, but for numbers.

    Paths of an optimizer's slots hold those of its variables, with `_` for `/`, after names of
    optimizers, which one that holds another puts in front of it if it is built in a training step.
    """
    if one[0] == "optimizer_variables":
        in_front = _is_end("/".join(one[1:-1]), "/".join(other[1:-1]), "/")
        return in_front and _is_end(one[-1], other[-1], "_")
    return _is_end("/".join(one[1:]), "/".join(other[1:]), "/")


def _is_end(one: str, other: str, separator: str) -> bool:
    """Whether one name is the other, or the end of it after a separator, but for numbers."""
    short, long = sorted((_NUMBER.sub("", name) for name in (one, other)), key=len)
    return long == short or long.endswith(f"{separator}{short}")


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


def fit_value(
    variable: Any, array: SavedArray, saved_backend: str | None
) -> tuple[SavedArray | None, str]:
    """Returns a saved array as a variable takes it; or None, and why it does not."""
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
        limits, whole = np.iinfo(dtype), np.asarray(array)
        if whole.size == 0 or limits.min <= whole.min() <= whole.max() <= limits.max:
            return whole.astype(dtype), ""
        return None, f"{problem}, with values that do not fit"
    return None, problem


def _describe(variable: Any) -> str:
    return f"{variable.dtype} {tuple(variable.shape)}"
