"""JAX arrays on the host."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepsave.errors import InvalidStateError
from stepsave.format.tree import Fields, NotedLeaf

_ArrayImpl = type(jnp.zeros(0))

_ALIGNMENT_BYTES = 64
"""At least of what XLA shares on the CPU."""

__all__ = (
    "describe",
    "device_name",
    "has_room",
    "is_on_accelerator",
    "make_like",
    "make_stage",
    "open_leaf",
    "view_on_host",
    "wrap_key",
)


def view_on_host(leaves: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Returns JAX arrays as NumPy arrays, waiting for the computations they come from.

    On the CPU this shares memory; from other devices all transfers are started before the
    first is waited for.
    """
    for leaf in leaves:
        if not _is_plain(leaf):
            _check(leaf)
            leaf.copy_to_host_async()
    return [np.asarray(leaf) for leaf in leaves]


_plain_dtypes: set[Any] = set()
_cpu_shardings: set[Any] = set()


def _is_plain(leaf: Any) -> bool:
    """Whether a leaf is known to be an array of the CPU that can be saved.

    Asking JAX takes several microseconds, and a state may have ten thousand arrays.
    """
    if type(leaf) is not _ArrayImpl:
        return False
    if leaf.sharding in _cpu_shardings and leaf.dtype in _plain_dtypes:
        return True
    _check(leaf)
    _plain_dtypes.add(leaf.dtype)
    if _is_on_cpu(leaf):
        _cpu_shardings.add(leaf.sharding)
        return True
    return False


def _check(leaf: Any) -> None:
    if not isinstance(leaf, jax.Array):
        raise InvalidStateError(f"expected a JAX array, found {type(leaf).__name__}.")
    if not leaf.is_fully_addressable:
        raise InvalidStateError(
            "the array is spread over several processes, which this version of stepsave "
            "does not save. Gather it first."
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise InvalidStateError(
            "a typed PRNG key has no bytes of its own. Save `jax.random.key_data(key)` "
            "and rebuild it with `jax.random.wrap_key_data`."
        )


def open_leaf(value: Any) -> NotedLeaf | Fields | None:
    """Says what a PRNG key or a registered container is; None of arrays and what is unknown.

    Raises:
        InvalidStateError: If it is a container whose children have no names.
    """
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return None
        data = jax.random.key_data(value)
        return NotedLeaf(data, "prng_key", str(jax.random.key_impl(value)))
    flatten: Any = jax.tree_util.tree_flatten_with_path

    def is_child(node: object) -> bool:
        return node is not value

    children, structure = flatten(value, is_leaf=is_child)
    items: dict[str, Any] = {}
    for path, child in children:
        if not path:
            return None  # not registered: a leaf to JAX
        name = getattr(path[0], "name", getattr(path[0], "key", None))
        if len(path) != 1 or not isinstance(name, str):
            raise InvalidStateError(
                f"expected a container that names its children, found {type(value).__name__}, "
                f"registered with JAX without names ({path[0]!r}). Register it with keys, or save "
                "a dict of its children."
            )
        items[name] = child
    return Fields(items, structure.unflatten)


def wrap_key(data: jax.Array, implementation: str) -> jax.Array:
    """Returns the PRNG key that has this data."""
    return jax.random.wrap_key_data(data, impl=implementation)


def make_like(array: np.ndarray[Any, Any], like: jax.Array) -> jax.Array:
    """Returns an array of JAX, laid out over the same devices. The memory is its own.

    Raises:
        InvalidStateError: If JAX would take it as another dtype.
    """
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise InvalidStateError(f"JAX has no {array.dtype} now. Set `jax_enable_x64`.")
    if _is_on_cpu(like):
        array = _copy_aligned(array)
    if like.committed:
        return jax.device_put(array, like.sharding)
    made = jax.device_put(array)
    return made if made.sharding == like.sharding else jax.device_put(made, like.sharding)


def _copy_aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns a copy that `device_put` takes as it is: it shares aligned memory, and copies other.

    Were it given memory of somebody else's, it would share that if it happens to be aligned.
    """
    room = np.empty(array.nbytes + _ALIGNMENT_BYTES, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT_BYTES
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def device_name(leaf: Any) -> str:
    """Returns the name of an array's device, the first one if there are several."""
    return str(min(leaf.sharding.device_set, key=lambda device: device.id))


def _is_on_cpu(leaf: jax.Array) -> bool:
    return next(iter(leaf.sharding.device_set)).platform == "cpu"


def describe(leaves: Sequence[Any]) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Returns shape and dtype of each array as it will be on the host."""
    for leaf in leaves:
        _check(leaf)
    return [(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves]


def is_on_accelerator(leaves: Sequence[Any]) -> bool:
    """Whether any array is not in host memory."""
    return not all(_is_on_cpu(leaf) for leaf in leaves)


def has_room(leaves: Sequence[Any], headroom: float) -> bool:
    """Whether the devices have room for a copy, at the peak of what was in use so far."""
    needed_bytes: collections.Counter[Any] = collections.Counter()  # by device
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            needed_bytes[shard.device] += shard.data.nbytes
    for device, size_bytes in needed_bytes.items():
        stats: dict[str, int] | None = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return False
        peak_bytes = stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0))
        if stats["bytes_limit"] - peak_bytes < size_bytes * headroom:
            return False
    return True


def make_stage(*, on_device: bool) -> _Stage:
    """Makes what takes JAX arrays off their devices; see `staging.Stage`."""
    return _Stage(on_device=on_device)


class _Stage:
    """Copies on the device into the memory of the copy before, or straight to pinned memory.

    Either way XLA keeps the order: the next training step, to which the arrays are donated,
    waits on the device until they have been read.
    """

    def __init__(self, *, on_device: bool) -> None:
        self.on_device = on_device
        self.blocks = False
        self._copies: list[jax.Array] | None = None
        self._copy: Any = None
        self._renew: Any = None

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Compiles both copies: compiling would stall the first two saves."""
        if not self.on_device:
            return
        state = list(leaves)
        places = [leaf.sharding for leaf in state]
        copy = jax.jit(_copy_all, out_shardings=places)
        # `keep_unused`, or XLA would drop the old copy instead of reusing its memory.
        renew = jax.jit(_copy_over, out_shardings=places, donate_argnums=1, keep_unused=True)
        self._copy = copy.lower(state).compile()
        self._renew = renew.lower(state, state).compile()
        self._copies = None

    def begin(self, leaves: Sequence[Any], _: object) -> _Transfer:
        state = list(leaves)
        if not self.on_device:
            # Memory of the CPU is not sent anywhere, so it must stay as it is.
            self.blocks = not is_on_accelerator(state)
            return _Transfer(_send(state), sent=True)
        try:
            return _Transfer(self._take(state), sent=False)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" in str(e):
                raise MemoryError(str(e)) from e
            raise

    def _take(self, state: list[jax.Array]) -> list[jax.Array]:
        old, self._copies = self._copies, None  # donated: lost, whatever happens
        copies: list[jax.Array]
        try:
            copies = self._copy(state) if old is None else self._renew(state, old)
        except (TypeError, ValueError):
            # The arrays have moved to other devices since; what was compiled says so.
            self.prepare(state)
            copies = self._copy(state)
        self._copies = copies
        return copies

    def pin(self, memory: object) -> None:
        """Nothing: JAX transfers to memory of its own."""

    def unpin(self) -> None:
        """Nothing to undo."""


class _Transfer:
    """Arrays on their way to the host; dropped when they are there."""

    def __init__(self, arrays: list[jax.Array], *, sent: bool) -> None:
        self._arrays = arrays
        self._is_sent = sent
        self._guard = threading.Lock()

    def __call__(self, leaf: int) -> np.ndarray[Any, Any]:
        with self._guard:  # the first thread that asks sends everything
            if not self._is_sent:
                self._arrays = _send(self._arrays)
                self._is_sent = True
        return np.asarray(self._arrays[leaf])


def _copy_all(state: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in state]


def _copy_over(state: list[jax.Array], _: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in state]


def _send(leaves: list[jax.Array]) -> list[jax.Array]:
    """Starts transfers to pinned host memory, which a device can write to at full speed.

    Unlike `copy_to_host_async`, the arrays sent outlive the donation of those they came from.
    """
    if not is_on_accelerator(leaves):
        return leaves
    pinned = [leaf.sharding.with_memory_kind("pinned_host") for leaf in leaves]
    return jax.device_put(leaves, pinned)
