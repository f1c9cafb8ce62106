"""JAX arrays in blocks: what of an array each device has, here and in other processes."""

from __future__ import annotations

import collections
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from stepsave.errors import InvalidStateError
from stepsave.format.layout import Grid
from stepsave.format.planning import Spread

__all__ = ("Region", "Spreads", "cut_parts", "has_many_devices", "regions_here", "spread_over")

Region = tuple[slice, ...]
"""A part of an array, one slice per axis, with both ends."""

_PROCESS_OF = operator.attrgetter("process_index")


def has_many_devices() -> bool:
    """Whether an array can lie on several devices of this process."""
    return jax.local_device_count() > 1


class Spreads:
    """How arrays lie on devices, each kind of array found out once: there may be many of each."""

    def __init__(self, *, is_alone: bool) -> None:
        """Knows of no array yet.

        Args:
            is_alone: Whether there is no other process.
        """
        self._is_alone = is_alone
        self._known: dict[tuple[Any, Grid], Spread] = {}
        self._bytes_of: collections.Counter[Any] = collections.Counter()

    def of(self, leaf: Any) -> Spread | None:
        """How an array lies on the devices of all processes; None if this process has it alone.

        Raises:
            InvalidStateError: If it lies in parts that processes do not have in common.
        """
        if not isinstance(leaf, jax.Array):
            return None
        sharding: Any = leaf.sharding
        if not leaf.sharding.addressable_devices:
            raise InvalidStateError(
                "expected an array of which this process has a part, or its own, found one that "
                "lies with other processes alone. Put it on a mesh of all."
            )
        if len(sharding.device_set) == 1:
            return None
        if leaf.is_fully_addressable and not self._is_alone:
            if leaf.is_fully_replicated:
                return None
            raise InvalidStateError(
                "expected an array that all processes have in common, or one device, found one "
                "in parts on several devices of this process alone. Put it on a mesh of all."
            )
        key = sharding, leaf.shape
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = spread_over(sharding, leaf.shape)
        return found

    def choose(self, leaf: Any, spread: Spread | None, block: Grid) -> int | None:
        """Returns which of an array's shards here is a block; None for an array on one device.

        Of replicas that of the device that has to send least so far.
        """
        if not isinstance(leaf, jax.Array):
            return None
        sharding: Any = leaf.sharding
        if len(sharding.device_set) == 1:
            return None
        # In the order of the shards. JAX itself cannot tell them of each array that it makes.
        indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(leaf.shape)
        shape = leaf.shape if spread is None else spread.block_shape
        places = [(device, _place(index, shape)) for device, index in indices.items()]
        some = [number for number, (_, place) in enumerate(places) if place == block]
        if leaf.is_fully_replicated:
            some = [0]  # JAX gives no other
        number = min(some, key=lambda number: self._bytes_of[places[number][0]])
        self._bytes_of[places[number][0]] += math.prod(shape) * leaf.dtype.itemsize
        return number


def spread_over(
    sharding: Any, shape: Grid, process_of: Callable[[Any], int] = _PROCESS_OF
) -> Spread:
    """Returns how arrays of a shape lie on the devices of a sharding.

    Args:
        sharding: Of JAX.
        shape: The shape.
        process_of: Which process has a device.

    Raises:
        InvalidStateError: If they are not cut into equal parts.
    """
    try:
        block_shape: Grid = tuple(sharding.shard_shape(shape))
        indices: Mapping[Any, Any] = sharding.devices_indices_map(shape)
    except ValueError as e:
        raise InvalidStateError(
            f"expected an array that its sharding cuts into equal parts: {e}. Use one that does."
        ) from e
    holders: dict[Grid, set[int]] = collections.defaultdict(set)
    for device, index in indices.items():
        holders[_place(index, block_shape)].add(process_of(device))
    return Spread(block_shape, {block: tuple(sorted(some)) for block, some in holders.items()})


def _place(index: Sequence[slice], block_shape: Grid) -> Grid:
    """The place of a shard in the grid of blocks."""
    return tuple(
        (cut.start or 0) // max(1, size) for cut, size in zip(index, block_shape, strict=True)
    )


def regions_here(array: Any) -> list[Region] | None:
    """Returns what of an array the devices of this process have; None if that is all of it."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return None
    sharding: Any = array.sharding
    indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(array.shape)
    found = {
        tuple(cut.indices(size)[:2] for cut, size in zip(index, array.shape, strict=True))
        for index in indices.values()
    }
    return [tuple(slice(*bounds) for bounds in region) for region in sorted(found)]


def cut_parts(parts: Sequence[Any], cuts: Sequence[Region | None]) -> list[Any]:
    """Returns pieces of arrays, cut out on their devices, for those that are to be cut."""
    by_device: dict[Any, list[int]] = collections.defaultdict(list)
    made = list(parts)
    for number, (part, cut) in enumerate(zip(parts, cuts, strict=True)):
        if cut is not None:
            by_device[part.sharding].append(number)
    for numbers in by_device.values():
        bounds = tuple(_bounds(cuts[number]) for number in numbers)
        pieces = _cut([parts[number] for number in numbers], bounds)
        for number, piece in zip(numbers, pieces, strict=True):
            made[number] = piece
    return made


def _bounds(cut: Region | None) -> tuple[tuple[int, int], ...]:
    assert cut is not None
    return tuple((one.start, one.stop) for one in cut)


@functools.partial(jax.jit, static_argnums=1)
def _cut(
    parts: Sequence[jax.Array], bounds: tuple[tuple[tuple[int, int], ...], ...]
) -> list[jax.Array]:
    return [
        part[tuple(slice(*bound) for bound in some)]
        for part, some in zip(parts, bounds, strict=True)
    ]
