"""Host buffers for snapshots: two arenas, allocated and touched once.

While one arena is being written the other can be filled (double buffering). Memory that is
touched for the first time costs up to fifty times a copy into warm memory, so arenas are
touched in the background as soon as their size is known and never given back before `close`.
"""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from stepsave.errors import ArenaMemoryError
from stepsave.snapshot import HostArray
from stepsave.spec import DTYPES, ChunkSpec, LayoutPlan

__all__ = ("Arena", "ArenaPool", "copy_thread_count")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_HUGE_PAGE_BYTES = 2 << 20
# Room for the few metrics that Keras on TensorFlow builds only in the first step: the
# layout then grows by some bytes, and the arenas need not be made again.
_SLACK_BYTES = 1 << 20
# Below this a copy costs less than handing it to another thread.
_SMALL_COPY_BYTES = 64 << 10
# NumPy copies these dtypes with a plain loop over bytes; others go through slower code
# that also holds the GIL, so extension types are copied as unsigned integers.
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def copy_thread_count() -> int:
    """Threads that saturate memory bandwidth on most machines, within the process's share."""
    if hasattr(os, "sched_getaffinity"):
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)


class Arena:
    """One page-aligned host buffer, seen through a layout plan."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._mapping = mmap.mmap(-1, capacity_bytes)  # page-aligned, as O_DIRECT needs
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: Bytes = np.frombuffer(self._mapping, np.uint8)
        self._plan: LayoutPlan | None = None
        self._tasks: list[tuple[HostArray, int, slice | None]] = []
        self._groups: list[list[int]] = []

    def touch(self, part: int, parts: int) -> None:
        """Makes a share of the pages present, so that no snapshot pays for page faults."""
        share_bytes = -(-self.capacity_bytes // parts // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        self.bytes[part * share_bytes : (part + 1) * share_bytes : mmap.PAGESIZE] = 0

    def bind(self, plan: LayoutPlan, threads: int) -> None:
        """Prepares the views through which a state of this plan is copied in."""
        if self._plan is plan:
            return
        if self._plan is not None:
            # Gaps and chunk padding must be zeros, whatever another plan had there.
            self.bytes[:] = 0
        self._plan = plan
        self._tasks = [self._task(plan, chunk) for chunk in plan.chunks]
        self._groups = _group([chunk.data_bytes for chunk in plan.chunks], threads)

    def fill(
        self, arrays: list[HostArray], helpers: concurrent.futures.ThreadPoolExecutor | None
    ) -> None:
        """Copies a state in; returns when all of it is there.

        Args:
            arrays: The leaves of the bound plan, in its order, with its shapes and dtypes.
            helpers: Threads that copy beside the caller's.
        """
        sources = [_as_bits(array) for array in arrays]
        flats: dict[int, Bytes] = {}
        for _, leaf, part in self._tasks:
            if part is not None and leaf not in flats:
                flats[leaf] = np.ascontiguousarray(sources[leaf]).reshape(-1).view(np.uint8)

        def copy(group: list[int]) -> None:
            for i in group:
                target, leaf, part = self._tasks[i]
                np.copyto(target, sources[leaf] if part is None else flats[leaf][part])

        mine, *others = self._groups
        if helpers is None:
            for group in self._groups:
                copy(group)
            return
        futures = [helpers.submit(copy, group) for group in others]
        try:
            copy(mine)
        finally:
            # Also when interrupted: a helper must not write into an arena given back.
            concurrent.futures.wait(futures)
        for future in futures:
            future.result()

    def shard(self, number: int) -> Bytes:
        """The bytes of one shard of the bound plan."""
        assert self._plan is not None
        size_bytes = self._plan.shard_bytes
        return self.bytes[number * size_bytes : (number + 1) * size_bytes]

    def _task(self, plan: LayoutPlan, chunk: ChunkSpec) -> tuple[HostArray, int, slice | None]:
        """A chunk as (target view, leaf, part of the leaf's bytes or None for all)."""
        leaf = plan.leaves[chunk.leaf]
        start, size_bytes = chunk.offset_bytes, chunk.data_bytes
        target = self.bytes[start : start + size_bytes]
        if size_bytes == leaf.size_bytes:
            bits = _bits_dtype(DTYPES[leaf.dtype])
            return target.view(bits).reshape(leaf.shape), chunk.leaf, None
        part = slice(chunk.source_bytes, chunk.source_bytes + size_bytes)
        return target, chunk.leaf, part


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
        self._plan = plan
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

    def fill(self, arena: Arena, plan: LayoutPlan, arrays: list[HostArray]) -> None:
        """Copies a state of this plan into a leased arena."""
        arena.bind(plan, self._threads)
        arena.fill(arrays, self._helpers if self._threads > 1 else None)

    def release(self, arena: Arena) -> None:
        """Gives a leased arena back."""
        with self._changed:
            self._free.append(arena)
            self._changed.notify()

    def close(self) -> None:
        """Ends the helper threads. The memory goes when the last view of it does."""
        self.wait_touched()
        self._helpers.shutdown()


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


def _group(sizes_bytes: list[int], threads: int) -> list[list[int]]:
    """Deals copies out to threads; the first group is the caller's."""
    groups: list[list[int]] = [[] for _ in range(threads)]
    loads = [0] * threads
    order = sorted(range(len(sizes_bytes)), key=lambda i: -sizes_bytes[i])
    for i in order:
        # Small copies are all Python overhead under the GIL: more threads only get in
        # each other's way.
        number = 0 if sizes_bytes[i] < _SMALL_COPY_BYTES else loads.index(min(loads))
        groups[number].append(i)
        loads[number] += sizes_bytes[i]
    for group in groups:
        group.sort()
    return [groups[0], *(group for group in groups[1:] if group)]


def _bits_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    is_native = dtype.isbuiltin == 1
    return dtype if is_native else np.dtype(_BITS[dtype.itemsize])


def _as_bits(array: HostArray) -> HostArray:
    return array if array.dtype.isbuiltin == 1 else array.view(_bits_dtype(array.dtype))
