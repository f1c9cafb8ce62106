"""JAX arrays on the host."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from stepsave.errors import InvalidStateError
from stepsave.format.tree import Fields, NotedLeaf
from stepsave.snapshot.arrays import SavedArray, bytes_of
from stepsave.snapshot.jax_transfer import (
    PinnedPool,
    Transfer,
    by_device,
    bytes_by_device,
    has_pinned_memory,
    is_exhausted,
    send,
    send_pageable,
)
from stepsave.snapshot.page_locks import NoPins

_ArrayImpl = type(jax.device_put(np.zeros(0)))  # `jnp.zeros` would compile a program

_ALIGNMENT_BYTES = 64
"""Of memory that XLA may share on the CPU. Less is never enough for it."""

__all__ = (
    "can_write_over",
    "describe",
    "device_name",
    "has_room",
    "is_on_accelerator",
    "make_like",
    "make_own",
    "make_pins",
    "make_stage",
    "open_leaf",
    "signature",
    "view_on_host",
    "wait_computed",
    "wrap_key",
    "write_over",
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


def wait_computed(leaves: Sequence[Any]) -> None:
    """Returns when the computations that the arrays come from have ended."""
    jax.block_until_ready(leaves)


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
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        raise InvalidStateError(
            f"expected a JAX array with values, found {type(leaf).__name__}. Save outside of `jit`."
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


def make_like(array: SavedArray, like: jax.Array) -> jax.Array:
    """Returns an array of JAX, laid out over the same devices. The memory is its own.

    Raises:
        InvalidStateError: If JAX would take it as another dtype.
    """
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise InvalidStateError(f"JAX has no {array.dtype} now. Set `jax_enable_x64`.")
    return make_own(array, like)


def make_own(array: SavedArray, like: jax.Array) -> jax.Array:
    """The same of an array that JAX has a dtype for, in memory that it can donate."""
    is_on_cpu = _is_on_cpu(like)
    if len(like.sharding.device_set) == 1:
        source = _copy_misaligned(array) if is_on_cpu else np.asarray(array)
        return _put_like(source, like)

    # Each process puts what its devices have; `device_put` would have them compare it all.
    def part(index: Any) -> np.ndarray[Any, Any]:
        piece = array[index]
        return _copy_misaligned(piece) if is_on_cpu else piece

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _put_like(source: np.ndarray[Any, Any], like: jax.Array) -> jax.Array:
    if like.committed:
        return jax.device_put(source, like.sharding)
    made = jax.device_put(source)
    return made if made.sharding == like.sharding else jax.device_put(made, like.sharding)


def can_write_over(value: jax.Array) -> bool:
    """Whether `write_over` can have the memory of an array."""
    sharding = value.sharding
    is_single = isinstance(sharding, jax.sharding.SingleDeviceSharding)
    return is_single and _is_on_cpu(value) and not value.is_deleted()


def write_over(array: SavedArray, value: jax.Array) -> jax.Array:
    """Returns an array with other values in the memory of `value`, which nobody has any more.

    New memory would have to be made present, which may take longer than to read a backup from a
    disk. Where JAX cannot give the memory away, as somebody looks at it by NumPy, it takes other.
    Compiles once for each shape and dtype. `can_write_over` says where.
    """
    made = _write_over(_put_like(np.asarray(array), value), value)
    return made.block_until_ready()  # JAX reads what NumPy has; that may be overwritten then


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _write_over(array: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.copy(array)


def _copy_misaligned(array: SavedArray) -> np.ndarray[Any, Any]:
    """Returns a copy that JAX copies again, to memory of its own: what is aligned it would share.

    What it shares it cannot donate.
    """
    itemsize = array.dtype.itemsize
    size_bytes = math.prod(array.shape) * itemsize
    room = np.empty(size_bytes + _ALIGNMENT_BYTES + itemsize, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT_BYTES + itemsize
    copy = room[begin : begin + size_bytes]
    np.concatenate(bytes_of(array), out=copy)
    return copy.view(array.dtype).reshape(array.shape)


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


signature = operator.attrgetter("aval", "sharding")
"""Of an array; two with the same one are described alike."""


def is_on_accelerator(leaves: Sequence[Any]) -> bool:
    """Whether any array is not in host memory."""
    return not all(_is_on_cpu(leaf) for leaf in leaves)


def has_room(leaves: Sequence[Any], headroom: float, reserve: float) -> bool:
    """Whether the devices have room for a copy, at the peak of what was in use so far."""
    for device, size_bytes in bytes_by_device(leaves).items():
        stats: dict[str, int] | None = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return False
        limit_bytes = stats["bytes_limit"]
        peak_bytes = stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0))
        if limit_bytes - peak_bytes < size_bytes * headroom + limit_bytes * reserve:
            return False
    return True


def make_pins(leaves: Sequence[Any]) -> PinnedPool | NoPins:
    """Makes what gets JAX's pinned memory ready; see `staging.Pins`."""
    if not is_on_accelerator(leaves):
        return NoPins()
    sizes_bytes = bytes_by_device(leaves)
    return PinnedPool(sizes_bytes) if all(map(has_pinned_memory, sizes_bytes)) else NoPins()


def make_stage(pins: PinnedPool | NoPins, *, on_device: bool) -> _Stage:
    """Makes what takes JAX arrays off their devices; see `staging.Stage`."""
    return _Stage(pins, on_device=on_device)


@dataclasses.dataclass(frozen=True, slots=True)
class _Programs:
    """What copies the arrays on one device: into new memory, or over the copies before."""

    numbers: list[int]
    copy: Any
    renew: Any


class _Stage:
    """Copies on the device into the memory of the copy before, or straight to pinned memory.

    Either way XLA keeps the order: the next training step, to which the arrays are donated,
    waits on the device until they have been read. Only if there is no pinned memory the caller
    has to wait.
    """

    def __init__(self, pins: PinnedPool | NoPins, *, on_device: bool) -> None:
        self.on_device = on_device
        self.blocks = False
        self._pool = pins if isinstance(pins, PinnedPool) else None
        # Replaced as one: no interruption leaves one state's looks with another's programs.
        self._compiled: tuple[list[Any], list[_Programs]] | None = None
        self._copies: list[jax.Array] | None = None

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Compiles both copies: compiling would stall the first two saves."""
        self._copies = None
        self._compiled = self._compile(leaves)

    def _compile(self, leaves: Sequence[Any]) -> tuple[list[Any], list[_Programs]]:
        programs: list[_Programs] = []
        for numbers in by_device(leaves).values() if self.on_device else ():
            some = [leaves[number] for number in numbers]
            places = [leaf.sharding for leaf in some]
            copy = jax.jit(_copy_all, out_shardings=places)
            # `keep_unused`, or XLA would drop the old copy instead of reusing its memory.
            renew = jax.jit(_copy_over, out_shardings=places, donate_argnums=1, keep_unused=True)
            compiled = copy.lower(some).compile(), renew.lower(some, some).compile()
            programs.append(_Programs(numbers, *compiled))
        return list(map(signature, leaves)), programs

    def begin(self, leaves: Sequence[Any], _: object, __: object) -> Transfer:
        if self._compiled is None or self._compiled[0] != list(map(signature, leaves)):
            self.prepare(leaves)  # of other sizes, or on other devices
        if not self.on_device:
            sent = send(leaves, self._pool)
            self.blocks = sent is None
            return Transfer(sent or send_pageable(leaves), self._pool, sent=True)
        try:
            return self._copy(leaves)
        except (TypeError, ValueError):
            # What was compiled knows of a difference that descriptions do not tell.
            self.prepare(leaves)
            return self._copy(leaves)

    def _copy(self, leaves: Sequence[Any]) -> Transfer:
        assert self._compiled is not None
        old, self._copies = self._copies, None  # donated: lost, whatever happens
        copies = list(leaves)  # all are replaced
        try:
            for each in self._compiled[1]:
                some = [leaves[number] for number in each.numbers]
                if old is None:
                    made = each.copy(some)
                else:
                    made = each.renew(some, [old[number] for number in each.numbers])
                for number, copy in zip(each.numbers, made, strict=True):
                    copies[number] = copy
        except jax.errors.JaxRuntimeError as e:
            if is_exhausted(e):
                raise MemoryError(str(e)) from e
            raise
        self._copies = copies
        return Transfer(copies, self._pool, sent=False)

    def release(self) -> None:
        """Nothing: JAX keeps the order."""

    def free(self) -> None:
        self._copies = None

    def settle(self) -> None:
        """Nothing: JAX transfers to memory of its own."""


def _copy_all(state: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in state]


def _copy_over(state: list[jax.Array], _: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in state]
