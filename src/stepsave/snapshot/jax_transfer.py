"""JAX arrays on their way to the host: each distinct part of them once, through pinned memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

__all__ = (
    "Cut",
    "PinnedPool",
    "Transfer",
    "bytes_by_device",
    "has_pinned_memory",
    "is_exhausted",
    "send",
    "send_pageable",
)

_logger = logging.getLogger("stepsave")

_BLOCK_BYTES = 64 << 20
_PINNED = "pinned_host"


class Cut:
    """How arrays are cut into *parts* of one device each: one replica of each distinct shard."""

    def __init__(self, leaves: Sequence[Any]) -> None:
        self._avals = [leaf.aval for leaf in leaves]
        self._shardings = [leaf.sharding for leaf in leaves]
        # Of each leaf: which of its shards, as JAX counts them, and what of the leaf they are.
        self._shards: list[list[tuple[int | None, Any]]] = list(map(_shards, leaves))
        self._is_plain = all(shards[0][0] is None for shards in self._shards if shards)
        self._first: list[int] = []
        count = 0
        for shards in self._shards:
            self._first.append(count)
            count += len(shards)
        self.by_device: dict[Any, list[int]] = {}
        for number, part in enumerate(self.parts(leaves)):
            (device,) = part.sharding.device_set
            self.by_device.setdefault(device, []).append(number)

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether these are cut likewise. A step returns arrays with the same descriptions."""
        return [leaf.sharding for leaf in leaves] == self._shardings and [
            leaf.aval for leaf in leaves
        ] == self._avals

    def parts(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """Returns the parts of all leaves. They share memory, so drop them before a donation."""
        if self._is_plain:
            return list(leaves)
        return [
            leaf if number is None else leaf.addressable_data(number)
            for leaf, shards in zip(leaves, self._shards, strict=True)
            for number, _ in shards
        ]

    def join(self, leaf: int, parts: Sequence[jax.Array]) -> np.ndarray[Any, Any]:
        """Returns a leaf on the host, waiting for its parts."""
        first, shards = self._first[leaf], self._shards[leaf]
        if len(shards) == 1:
            return np.asarray(parts[first])
        aval = self._avals[leaf]
        joined = np.empty(aval.shape, aval.dtype)
        for i, (_, index) in enumerate(shards):
            joined[index] = np.asarray(parts[first + i])
        return joined


def _shards(leaf: Any) -> list[tuple[int | None, Any]]:
    if len(leaf.sharding.device_set) == 1:
        return [(None, ...)]
    # Of each distinct one the first that this process has.
    first: dict[str, tuple[int | None, Any]] = {}
    for number, shard in enumerate(leaf.addressable_shards):
        first.setdefault(str(shard.index), (number, shard.index))
    return list(first.values())


def bytes_by_device(leaves: Sequence[Any]) -> dict[Any, int]:
    """Returns how much of a state has to be copied on, or sent from, each device."""
    cut = Cut(leaves)
    parts = cut.parts(leaves)
    return {
        device: sum(parts[number].nbytes for number in numbers)
        for device, numbers in cut.by_device.items()
    }


def has_pinned_memory(device: Any) -> bool:
    """Whether JAX knows of host memory that the device can write to directly."""
    return any(memory.kind == _PINNED for memory in device.addressable_memories())


class PinnedPool:
    """JAX's own pinned host memory, which it keeps, grown before the first snapshot needs it."""

    def __init__(self, sizes_bytes: Mapping[Any, int]) -> None:
        """Takes nothing yet.

        Args:
            sizes_bytes: How much a state takes, by device.
        """
        self._sizes_bytes = sizes_bytes
        self._is_warm = False
        self.is_refused = False

    def pin(self, _: object) -> None:
        """Has JAX take as much memory as a state needs; it keeps it for the transfers."""
        if self._is_warm:
            return
        self._is_warm = True
        try:
            held: list[jax.Array] = []
            for device, size_bytes in self._sizes_bytes.items():
                # In the very way of the transfers, and of blocks, so that nothing is compiled.
                block = jax.device_put(np.zeros(min(size_bytes, _BLOCK_BYTES), np.uint8), device)
                held += [_to_pinned([block])[0] for _ in range(0, size_bytes, _BLOCK_BYTES)]
            jax.block_until_ready(held)
        except jax.errors.JaxRuntimeError as e:
            if not is_exhausted(e):
                raise
            self.refuse(e)

    def unpin(self) -> None:
        """Nothing: the memory is JAX's."""

    def refuse(self, error: Exception) -> None:
        """Has snapshots from now on go another way."""
        self.is_refused = True
        _logger.warning(
            "JAX has not as much pinned memory as the state takes, so snapshots take longer: %s",
            str(error).partition("\n")[0],
        )


class Transfer:
    """Parts of arrays on their way to the host; dropped when they are there."""

    def __init__(
        self, cut: Cut, parts: list[jax.Array], pool: PinnedPool | None, *, sent: bool
    ) -> None:
        self._cut = cut
        self._parts = parts
        self._pool = pool
        self._is_sent = sent
        self._guard = threading.Lock()

    def __call__(self, leaf: int) -> np.ndarray[Any, Any]:
        with self._guard:  # the first thread that asks sends everything
            if not self._is_sent:
                self._parts = send(self._parts, self._pool) or send_pageable(self._parts)
                self._is_sent = True
        try:
            return self._cut.join(leaf, self._parts)
        except jax.errors.JaxRuntimeError as e:
            if self._pool is not None and is_exhausted(e):
                self._pool.refuse(e)
            raise


def send(parts: Sequence[jax.Array], pool: PinnedPool | None) -> list[jax.Array] | None:
    """Starts transfers to pinned host memory, which a device can write to at full speed.

    Unlike `copy_to_host_async`, the arrays sent outlive the donation of those they came from.

    Returns:
        Arrays in that memory; None if there is none.
    """
    if pool is None or pool.is_refused:
        return None
    try:
        return _to_pinned(parts)
    except jax.errors.JaxRuntimeError as e:
        if not is_exhausted(e):
            raise
        pool.refuse(e)
        return None


def send_pageable(parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Starts transfers to memory that NumPy can read; on the CPU shares it."""
    # Arrays of their own, as JAX keeps with an array what it has brought to the host.
    own = [part.addressable_data(0) for part in parts]
    for part in own:
        part.copy_to_host_async()
    return own


def _to_pinned(parts: Sequence[jax.Array]) -> list[jax.Array]:
    places = [part.sharding.with_memory_kind(_PINNED) for part in parts]
    # What is in pinned memory already is copied too: the next step may donate it.
    return jax.device_put(list(parts), places, may_alias=False)


def is_exhausted(error: Exception) -> bool:
    """Whether it says that there is no memory."""
    return "RESOURCE_EXHAUSTED" in str(error)
