"""Random generators that a data set owns: they move when it is read, and are put back with it.

A pipeline of images often has one of its own for its augmentation. It lies somewhere among the
attributes of the data set, or of the transforms that these hold.
"""

from __future__ import annotations

import collections
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import keras
import numpy as np

from stepsave.format.packing import pack, unpack

__all__ = ("OwnGenerators",)

# How far to look. What lies deeper is not found, and then not told of; a data set that holds
# everything must not be searched for minutes.
_DEPTH = 5
_MAX_ITEMS = 100
_MAX_OBJECTS = 5000

_State = tuple[Callable[[], Any], Callable[[Any], None]]


class OwnGenerators:
    """The random generators of an object, each once."""

    def __init__(self, owner: Any) -> None:
        """Looks for them.

        Args:
            owner: The data set; None for data without one.
        """
        self._found = dict(_find(owner))

    def __bool__(self) -> bool:
        return bool(self._found)

    def state(self) -> Any:
        """Their states, as a document for JSON."""
        return {where: pack(get()) for where, (get, _) in self._found.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` returned, where they are the same ones."""
        for where, (_, put) in self._found.items():
            if where in state:
                put(unpack(state[where]))


def _find(owner: Any) -> Iterator[tuple[str, _State]]:
    pending: collections.deque[tuple[str, Any, int]] = collections.deque([("", owner, 0)])
    seen: set[int] = set()
    while pending and len(seen) < _MAX_OBJECTS:
        where, value, depth = pending.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        state = _state_of(value)
        if state is not None:
            yield where, state
        elif depth < _DEPTH:
            pending.extend((f"{where}.{name}", v, depth + 1) for name, v in _parts(value))


def _state_of(value: Any) -> _State | None:  # noqa: PLR0911  one for each kind
    if isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if isinstance(value, np.random.RandomState):
        if value is getattr(np.random.mtrand, "_rand", None):
            return None  # the global one
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, keras.random.SeedGenerator):
        seed: Any = value.state
        return lambda: np.asarray(keras.ops.convert_to_numpy(seed)), seed.assign
    return None


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    """What an object holds; nothing of what holds everything, or only numbers."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType, keras.Model)):
        return ()
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value)
        return ((str(key), v) for key, v in items.items()) if len(items) <= _MAX_ITEMS else ()
    if isinstance(value, (list, tuple)):
        sequence = cast("list[Any]", value)
        return ((str(i), v) for i, v in enumerate(sequence)) if len(sequence) <= _MAX_ITEMS else ()
    return list(vars(value).items()) if hasattr(value, "__dict__") else ()
