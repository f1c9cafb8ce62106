"""JAX arrays on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepsave.errors import InvalidStateError

__all__ = ("device_name", "view_on_host")


def view_on_host(leaves: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Returns JAX arrays as NumPy arrays, waiting for the computations they come from.

    On the CPU this shares memory; from other devices all transfers are started before the
    first is waited for.
    """
    for leaf in leaves:
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
        if not _is_on_cpu(leaf):
            leaf.copy_to_host_async()
    return [np.asarray(leaf) for leaf in leaves]


def device_name(leaf: Any) -> str:
    """Returns the name of an array's device, the first one if there are several."""
    return str(min(leaf.sharding.device_set, key=lambda device: device.id))


def _is_on_cpu(leaf: jax.Array) -> bool:
    return next(iter(leaf.sharding.device_set)).platform == "cpu"
