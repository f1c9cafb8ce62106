"""JAX arrays on their way to the host, through pinned memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

__all__ = (
    "PinnedPool",
    "Transfer",
    "by_device",
    "bytes_by_device",
    "has_pinned_memory",
    "is_exhausted",
    "send",
    "send_pageable",
)

_logger = logging.getLogger("stepsave")

_BLOCK_BYTES = 64 << 20
_PINNED = "pinned_host"


def bytes_by_device(leaves: Sequence[Any]) -> dict[Any, int]:
    """Returns how much of a state has to be copied on, or sent from, each device."""
    return {
        device: sum(leaves[number].nbytes for number in numbers)
        for device, numbers in by_device(leaves).items()
    }


def by_device(leaves: Sequence[Any]) -> dict[Any, list[int]]:
    """Returns the numbers of the arrays on each device. Each array is on one."""
    found: dict[Any, list[int]] = {}
    for number, leaf in enumerate(leaves):
        (device,) = leaf.sharding.device_set
        found.setdefault(device, []).append(number)
    return found


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
    """Arrays on their way to the host; dropped when they are there."""

    def __init__(self, arrays: list[jax.Array], pool: PinnedPool | None, *, sent: bool) -> None:
        self._arrays = arrays
        self._pool = pool
        self._is_sent = sent
        self._guard = threading.Lock()

    def __call__(self, leaf: int) -> np.ndarray[Any, Any]:
        with self._guard:  # the first thread that asks sends everything
            if not self._is_sent:
                self._arrays = send(self._arrays, self._pool) or send_pageable(self._arrays)
                self._is_sent = True
        try:
            return np.asarray(self._arrays[leaf])
        except jax.errors.JaxRuntimeError as e:
            if self._pool is not None and is_exhausted(e):
                self._pool.refuse(e)
            raise


def send(arrays: Sequence[jax.Array], pool: PinnedPool | None) -> list[jax.Array] | None:
    """Starts transfers to pinned host memory, which a device can write to at full speed.

    Unlike `copy_to_host_async`, the arrays sent outlive the donation of those they came from.

    Returns:
        Arrays in that memory; None if there is none.
    """
    if pool is None or pool.is_refused:
        return None
    try:
        return _to_pinned(arrays)
    except jax.errors.JaxRuntimeError as e:
        if not is_exhausted(e):
            raise
        pool.refuse(e)
        return None


def send_pageable(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Starts transfers to memory that NumPy can read; on the CPU shares it."""
    # Arrays of their own, as JAX keeps with an array what it has brought to the host.
    own = [array.addressable_data(0) for array in arrays]
    for array in own:
        array.copy_to_host_async()
    return own


def _to_pinned(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    places = [array.sharding.with_memory_kind(_PINNED) for array in arrays]
    # What is in pinned memory already is copied too: the next step may donate it.
    return jax.device_put(list(arrays), places, may_alias=False)


def is_exhausted(error: Exception) -> bool:
    """Whether it says that there is no memory."""
    return "RESOURCE_EXHAUSTED" in str(error)
