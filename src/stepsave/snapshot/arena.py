"""Host buffers for snapshots: two arenas, allocated and touched once.

While one arena is being written the other can be filled (double buffering). Memory that is
touched for the first time costs up to fifty times a copy into warm memory, so arenas are
touched in the background as soon as their size is known and never given back before `close`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import os
import threading
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from stepsave.errors import ArenaMemoryError
from stepsave.format.records import LayoutPlan
from stepsave.snapshot.filling import Filling, Run, Source, compile_runs, digest_shard

__all__ = ("Arena", "ArenaPool", "allocate_pages", "copy_thread_count")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_HUGE_PAGE_BYTES = 2 << 20
# Room for the few metrics that Keras on TensorFlow builds only in the first step: the
# layout then grows by some bytes, and the arenas need not be made again.
_SLACK_BYTES = 1 << 20


def copy_thread_count() -> int:
    """Threads that saturate memory bandwidth on most machines, within the process's share."""
    if hasattr(os, "sched_getaffinity"):
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)


def allocate_pages(size_bytes: int, *, inherited: bool = True) -> Bytes:
    """Returns page-aligned memory, as direct input and output need it, in large pages if it can.

    It reads as zeros, and costs time when it is first touched.

    Args:
        size_bytes: How much.
        inherited: Whether children made by `fork` see it. If they do, each page that is
            written while they live is first copied.
    """
    # Private, because most kernels give no large pages to shared memory, the default.
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(mapping, "MADV_HUGEPAGE")
    if not inherited:
        _advise(mapping, "MADV_DONTFORK")
    return np.frombuffer(mapping, np.uint8)


def _advise(mapping: mmap.mmap, advice: str) -> None:
    option = getattr(mmap, advice, None)
    if option is not None:
        with contextlib.suppress(OSError):  # a kernel that does not know it; it is only faster
            mapping.madvise(option)


class Arena:
    """One page-aligned host buffer, seen through a layout plan."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.bytes = allocate_pages(capacity_bytes, inherited=False)
        self._plan: LayoutPlan | None = None
        self._runs: list[Run] = []

    def touch(self, part: int, parts: int) -> None:
        """Makes a share of the pages present, so that no snapshot pays for page faults."""
        share_bytes = -(-self.capacity_bytes // parts // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        self.bytes[part * share_bytes : (part + 1) * share_bytes : mmap.PAGESIZE] = 0

    def bind(self, plan: LayoutPlan) -> None:
        """Prepares the views through which a state of this plan is copied in."""
        if self._plan is plan:
            return
        if self._plan is not None:
            # Gaps and chunk padding must be zeros, whatever another plan had there.
            self.bytes[:] = 0
        self._plan = plan
        self._runs = compile_runs(plan, self.bytes)

    def begin(self, source: Source) -> Filling:
        """Begins to fill the arena with a state of the bound plan; `Filling.work` does it."""
        assert self._plan is not None
        return Filling(self._runs, self._plan, source)

    def shard(self, number: int) -> Bytes:
        """The bytes of one shard of the bound plan."""
        assert self._plan is not None
        size_bytes = self._plan.shard_bytes
        return self.bytes[number * size_bytes : (number + 1) * size_bytes]

    def digest(self, number: int) -> int:
        """What `BackupRecord.shard_digests` describes, of a shard that is sealed."""
        assert self._plan is not None
        return digest_shard(self._plan, self.bytes, number)


class ArenaPool:
    """The arenas of one checkpointer: leases them out, one save each."""

    def __init__(self, plan: LayoutPlan) -> None:
        """Allocates two arenas, or one when memory is short, and starts touching them.

        Raises:
            ArenaMemoryError: If not even one fits.
        """
        capacity_bytes = -(-(plan.arena_bytes + _SLACK_BYTES) // _HUGE_PAGE_BYTES)
        capacity_bytes *= _HUGE_PAGE_BYTES
        self._threads = copy_thread_count()
        self._arenas = _allocate(capacity_bytes)
        self._free = list(self._arenas)
        self._changed = threading.Condition()
        self._helpers = concurrent.futures.ThreadPoolExecutor(
            self._threads, thread_name_prefix="stepsave-copy"
        )
        self._touching = [
            self._helpers.submit(arena.touch, part, self._threads)
            for arena in self._arenas
            for part in range(self._threads)
        ]

    @property
    def count(self) -> int:
        return len(self._arenas)

    @property
    def capacity_bytes(self) -> int:
        return self._arenas[0].capacity_bytes

    @property
    def memories(self) -> list[Bytes]:
        """The memory of all arenas."""
        return [arena.bytes for arena in self._arenas]

    def wait_touched(self) -> None:
        """Returns when all pages are present."""
        while self._touching:
            self._touching.pop().result()

    def acquire(self, *, block: bool) -> Arena | None:
        """Leases a free arena.

        Args:
            block: Whether to wait for one; else None is returned when both are in use.
        """
        self.wait_touched()
        with self._changed:
            while not self._free:
                if not block:
                    return None
                self._changed.wait()
            return self._free.pop()

    def bind(self, plan: LayoutPlan) -> None:
        """Prepares the free arenas for states of this plan, so that no save pays for it."""
        self.wait_touched()
        with self._changed:
            for arena in self._free:
                arena.bind(plan)

    def fill(self, filling: Filling) -> None:
        """Returns when a state is in its arena; the calling thread copies too."""
        with _failing(filling):
            self._call_helpers(filling)
            filling.work()
            filling.wait()

    def fill_later(self, filling: Filling) -> None:
        """Has a state copied into its arena by background threads."""
        with _failing(filling):
            self._helpers.submit(filling.work)
            self._call_helpers(filling)

    def _call_helpers(self, filling: Filling) -> None:
        for _ in range(self._threads - 1):
            self._helpers.submit(filling.help)  # what it raises, all who wait for it raise

    def release(self, arena: Arena, filling: Filling | None = None) -> None:
        """Gives a leased arena back, when no thread fills it any more."""
        if filling is not None:
            filling.wait_ended()
        with self._changed:
            self._free.append(arena)
            self._changed.notify()

    def close(self) -> None:
        """Ends the helper threads. The memory goes when the last view of it does."""
        self.wait_touched()
        self._helpers.shutdown()


@contextlib.contextmanager
def _failing(filling: Filling) -> Generator[None]:
    """Gives a state up if the body raises: nobody must wait for what nobody fills."""
    try:
        yield
    except BaseException as e:
        filling.fail(e)
        raise


def _allocate(capacity_bytes: int) -> list[Arena]:
    available_bytes = _available_bytes()
    arenas: list[Arena] = []
    for number in range(2):
        fits = available_bytes is None or capacity_bytes * (number + 1) <= available_bytes
        try:
            if fits:
                arenas.append(Arena(capacity_bytes))
        except (OSError, MemoryError):  # an address-space limit, say
            fits = False
        if not fits:
            break
    size = f"{capacity_bytes / 2**20:.0f} MiB"
    found = "unknown" if available_bytes is None else f"{available_bytes / 2**20:.0f} MiB"
    if not arenas:
        raise ArenaMemoryError(
            f"A host copy of the training state needs {size}, but available memory is {found}. "
            "Free memory, use a larger machine, or save a smaller state."
        )
    if len(arenas) == 1:
        warnings.warn(
            f"stepsave: two host copies of the training state need 2 x {size}, but available "
            f"memory is {found}. Using one: a save that is due while the one before it is "
            "being written has to wait for it.",
            stacklevel=2,
        )
    return arenas


def _available_bytes() -> int | None:
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
