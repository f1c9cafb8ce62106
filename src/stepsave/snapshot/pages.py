"""Host memory in whole pages: how much there is, who has it, and making it present.

Memory that is touched for the first time costs up to fifty times a copy into warm memory. So it is
touched in the background, while a training starts, and never given back before the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from stepsave.threads import Fate, Latch

__all__ = (
    "HUGE_PAGE_BYTES",
    "Bytes",
    "Pages",
    "Touching",
    "allocate_pages",
    "available_bytes",
    "trim_heap",
)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

HUGE_PAGE_BYTES = 2 << 20

_PIECE_BYTES = 8 << 20
"""How much is touched at a time: the most that somebody waits for who needs the memory now."""

_FAST_BYTES_PER_S = 1.5e9
"""What a core makes present at least where nothing but zeroing the pages takes time."""

_RESTS = 9
"""How long a thread rests after each piece where it is slower, in times of what that took."""


class Pages:
    """Page-aligned memory, in large pages if the system can. It reads as zeros at first."""

    def __init__(self, size_bytes: int) -> None:
        """Maps it; none of it is present yet.

        Raises:
            OSError: If the system has no room, or a limit forbids it.
        """
        self.size_bytes = size_bytes
        # Private, because most kernels give no large pages to shared memory, the default.
        self._mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._lent: weakref.ref[Bytes] | None = None
        self._advise("MADV_HUGEPAGE")

    def view(self) -> Bytes:
        """The memory as an array."""
        return np.frombuffer(self._mapping, np.uint8)

    def lend(self) -> Bytes:
        """The memory for somebody else, who has it as long as any view of this array lives."""
        array = self.view()
        self._lent = weakref.ref(array)
        return array

    @property
    def is_lent(self) -> bool:
        return self._lent is not None and self._lent() is not None

    def keep_from_children(self) -> None:
        """Hides it from children made by `fork`.

        Else each page that is written while they live would first be copied.
        """
        self._advise("MADV_DONTFORK")

    def _advise(self, advice: str) -> None:
        option = getattr(mmap, advice, None)
        if option is not None:
            with contextlib.suppress(OSError):  # a kernel that does not know it; it is only faster
                self._mapping.madvise(option)


def allocate_pages(size_bytes: int) -> Bytes:
    """Returns page-aligned memory, as direct input and output need it, for those who keep it."""
    return Pages(size_bytes).view()


class Touching:
    """Makes memory present in the background, until somebody needs it.

    Where the host of a virtual machine backs memory only when it is touched, it does so for the
    whole machine at one slow rate. A training that starts needs that too, so most of it is left to
    it: there a thread that touches rests most of the time.
    """

    def __init__(self, memory: Bytes) -> None:
        """Begins nothing yet.

        Args:
            memory: All zeros. Nobody writes there before `stop`.
        """
        self._memory = memory
        self._fate = Fate()
        self._hurried, self._wanted, self._ended = Latch(), Latch(), Latch()

    def run(self) -> None:
        """Touches all of it, or what there is time for; for a thread of a crew."""
        try:
            if self._fate.accept():
                for begin in range(0, len(self._memory), _PIECE_BYTES):
                    began_s = time.perf_counter()
                    self._memory[begin : begin + _PIECE_BYTES : mmap.PAGESIZE] = 0
                    took_s = time.perf_counter() - began_s
                    is_slow = took_s * _FAST_BYTES_PER_S > _PIECE_BYTES
                    if is_slow:
                        self._hurried.wait(_RESTS * took_s)
                    if self._wanted.is_open:
                        break
        finally:
            self._ended.open()

    def stop(self) -> None:
        """Returns when nobody touches it any more. What is not present yet costs its time later."""
        self._wanted.open()
        self._hurried.open()
        if not self._fate.drop():  # begun, so it ends with the piece that it is at
            self._ended.wait()

    def hurry(self) -> None:
        """Has it go on without rests: somebody waits for all of it."""
        self._hurried.open()

    def wait(self) -> None:
        """Returns when all of it is present, or it was stopped."""
        self._ended.wait()


def trim_heap() -> None:
    """Gives back to the system what was freed, where the C library keeps it (glibc does).

    Values of a state that were replaced are not missed: others are rarely of their sizes, and
    none come from where a thread of JAX or TensorFlow got them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def available_bytes() -> int | None:
    """Memory that can be used without swapping, as far as the system tells."""
    found: list[int] = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = meminfo.read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    # A container's own limit, cgroup v2; a missing file or "max" means no limit.
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists():
        text = limit.read_text().strip()
        if text.isdecimal():
            found.append(max(0, int(text) - int(used.read_text())))
    return min(found, default=None)
