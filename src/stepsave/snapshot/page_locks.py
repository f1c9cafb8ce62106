"""Page-locked host memory, which a GPU writes to directly, at several times the speed."""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any, Protocol

import numpy as np

from stepsave.errors import ArenaMemoryError
from stepsave.threads import Crew

__all__ = ("Driver", "NoPins", "PageLocks")

_logger = logging.getLogger("stepsave")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered

_stuck: list[Bytes] = []
"""Memory that the driver did not let go of, and that therefore must stay mapped."""


class Driver(Protocol):
    """The two calls of a GPU's runtime. Both return its error code, 0 for success."""

    def register(self, address: int, size_bytes: int) -> int: ...
    def unregister(self, address: int) -> int: ...


class NoPins:
    """For devices that transfer to memory of their own, or are the host; see `staging.Pins`."""

    def pin(self, memory: object) -> None:
        """Nothing."""

    def unpin(self) -> None:
        """Nothing to undo."""


class PageLocks:
    """Memory that is page-locked, from `pin` until `unpin`.

    It stays mapped that long, whoever else drops it. The next mapping may get the address of one
    that was unmapped while registered, and transfers into it would go to the old pages.

    One thread that does nothing else makes all calls of the driver. A registration that fails
    leaves CUDA's last error set, for its thread: the next kernel that this thread launches would
    raise it. And so `pin` and `unpin` may be called by any thread.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._held: dict[int, Bytes] = {}
        self._crew = Crew(1, "stepsave-page-locks")
        # Not waited for: collections happen anywhere, in the midst of that thread's work too.
        unlock = functools.partial(_unlock, driver, self._held)
        weakref.finalize(self, self._crew.put, unlock).atexit = False

    def pin(self, memory: Bytes) -> None:
        """Page-locks memory; does nothing if it is. If that fails, transfers take longer.

        Raises:
            ArenaMemoryError: If the driver has other memory at that address: no transfer to it
                can be trusted.
        """
        self._crew.call(functools.partial(_lock, self._driver, self._held, memory))

    def unpin(self) -> None:
        """Undoes all `pin` did. No transfer may be in flight."""
        self._crew.call(functools.partial(_unlock, self._driver, self._held))


def _lock(driver: Driver, held: dict[int, Bytes], memory: Bytes) -> None:
    address = memory.ctypes.data
    if address in held:
        return
    code = driver.register(address, memory.nbytes)
    if code == _ALREADY_REGISTERED:
        raise ArenaMemoryError(
            f"Page-locking {memory.nbytes} bytes at {address:#x} for snapshots: the GPU's driver "
            f"has memory registered there (CUDA error {code}) that somebody has unmapped since. "
            "Transfers would go to that, so nothing can be saved. Find who unmaps memory "
            "without unregistering it, and restart the process."
        )
    if code:
        _logger.warning(
            "cannot page-lock %d bytes (CUDA error %d): snapshots take longer. Raise the limit "
            "on locked memory (ulimit -l).",
            memory.nbytes,
            code,
        )
        return
    held[address] = memory


def _unlock(driver: Driver, held: dict[int, Bytes]) -> None:
    while held:
        address, memory = held.popitem()
        code = driver.unregister(address)
        if code:
            _stuck.append(memory)
            _logger.warning(
                "cannot unlock %d bytes (CUDA error %d): they stay in use until the process ends.",
                memory.nbytes,
                code,
            )
