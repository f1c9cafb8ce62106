"""Host buffers for snapshots: two arenas, allocated and touched once.

While one arena is being written the other can be filled (double buffering). Memory that is
touched for the first time costs up to fifty times a copy into warm memory, so arenas are
touched in the background as soon as their size is known and never given back before `close`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from stepsave.errors import ArenaMemoryError
from stepsave.format.records import LayoutPlan
from stepsave.snapshot.filling import Filling
from stepsave.snapshot.runs import Run, Source, compile_runs, digest_shard
from stepsave.threads import Crew, Latch

__all__ = ("Arena", "ArenaPool", "Claim", "allocate_pages", "copy_thread_count")

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
        self.claim: Claim | None = None
        self.filling: Filling | None = None  # the last one
        # Both in one: no interruption leaves the views of one plan under the name of another.
        self._bound: tuple[LayoutPlan, list[Run]] | None = None

    def touch(self, part: int, parts: int) -> None:
        """Makes a share of the pages present, so that no snapshot pays for page faults."""
        share_bytes = -(-self.capacity_bytes // parts // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        self.bytes[part * share_bytes : (part + 1) * share_bytes : mmap.PAGESIZE] = 0

    @property
    def is_free(self) -> bool:
        """Whether no save has a hold on it."""
        return self.claim is None or self.claim.is_over

    def bind(self, plan: LayoutPlan) -> None:
        """Prepares the views through which a state of this plan is copied in."""
        bound = self._bound
        if bound is not None and bound[0] is plan:
            return
        if bound is not None:
            # Gaps and chunk padding must be zeros, whatever another plan had there.
            self.bytes[:] = 0
        self._bound = plan, compile_runs(plan, self.bytes)

    def begin(self, source: Source, *, is_led: bool = False) -> Filling:
        """Begins to fill the arena with a state of the bound plan."""
        assert self._bound is not None
        plan, runs = self._bound
        self.filling = Filling(runs, plan, source, is_led=is_led)
        return self.filling

    def shard(self, number: int) -> Bytes:
        """The bytes of one shard of the bound plan."""
        assert self._bound is not None
        size_bytes = self._bound[0].shard_bytes
        return self.bytes[number * size_bytes : (number + 1) * size_bytes]

    def digest(self, number: int) -> int:
        """What `BackupRecord.shard_digests` describes, of a shard that is sealed."""
        assert self._bound is not None
        return digest_shard(self._bound[0], self.bytes, number)


_numbers = itertools.count()


class Claim:
    """A save's hold on an arena.

    It ends when the state is on disk. If the call that claimed was interrupted before it handed
    the save over, it ends too: whoever comes next drops it. Both sides ask in one step, so only
    one of them gets it.
    """

    __slots__ = ("_fate", "number", "released")

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._fate: dict[None, str] = {}
        self.released = Latch()

    @property
    def is_over(self) -> bool:
        return self.released.is_open

    def accept(self) -> bool:
        """For the thread that writes: whether the save is its to write."""
        return self._fate.setdefault(None, "accepted") == "accepted"

    def release(self) -> None:
        """For the thread that writes: the arena may be used again."""
        self.released.open()

    def drop(self) -> bool:
        """For the caller: whether the save is given up, and nobody will write it."""
        is_dropped = self._fate.setdefault(None, "dropped") == "dropped"
        if is_dropped:
            self.released.open()
        return is_dropped


class ArenaPool:
    """The arenas of one checkpointer: lends them out, one save each.

    Nothing here says which are free: that follows from the claims on them. So none is lost,
    whatever is interrupted. Used by one thread; claims end on others.
    """

    def __init__(self, plan: LayoutPlan, crew: Crew) -> None:
        """Allocates two arenas, or one when memory is short, and has the crew touch them.

        Raises:
            ArenaMemoryError: If not even one fits.
        """
        capacity_bytes = -(-(plan.arena_bytes + _SLACK_BYTES) // _HUGE_PAGE_BYTES)
        capacity_bytes *= _HUGE_PAGE_BYTES
        self._threads = copy_thread_count()
        # Read by the crew: an interruption must leave no file open.
        self._arenas = _allocate(capacity_bytes, crew.call(_available_bytes))
        self._crew = crew
        self._touched: list[Latch] = []
        for arena in self._arenas:
            for part in range(self._threads):
                touched = Latch()
                crew.put(functools.partial(_touch, arena, part, self._threads, touched))
                self._touched.append(touched)

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
        for touched in self._touched:
            touched.wait()

    def acquire(self, claim: Claim, *, block: bool) -> Arena | None:
        """Lends a free arena.

        Args:
            claim: Of the save; until it is over the arena is the save's.
            block: Whether to wait for one; else None is returned when all are in use.
        """
        self.wait_touched()
        while True:
            self._quiet_free()
            for arena in self._arenas:
                if arena.is_free:
                    arena.claim = claim
                    return arena
            if not block:
                return None
            # Saves are written in the order in which they were begun: the other one is later.
            claims = [arena.claim for arena in self._arenas if arena.claim is not None]
            min(claims, key=lambda claim: claim.number).released.wait()

    def close(self) -> None:
        """Returns when nobody uses the memory any more. It goes when the last view of it does."""
        self.wait_touched()
        self._quiet_free()

    def _quiet_free(self) -> None:
        """Ends what an interrupted call may have left going on in arenas that are free."""
        for arena in self._arenas:
            if arena.is_free and arena.filling is not None:
                arena.filling.give_up()

    def bind(self, plan: LayoutPlan) -> None:
        """Prepares the free arenas for states of this plan, so that no save pays for it."""
        self.wait_touched()
        for arena in self._arenas:
            if arena.is_free:
                arena.bind(plan)

    def fill(self, filling: Filling) -> None:
        """Returns when a state is in its arena; the calling thread copies too."""
        self._call_helpers(filling)
        filling.work()

    def lead(self, filling: Filling) -> None:
        """Has threads of the crew copy a state into its arena."""
        self._crew.put(filling.lead)
        self._call_helpers(filling)

    def _call_helpers(self, filling: Filling) -> None:
        for _ in range(self._threads - 1):
            self._crew.put(filling.help)  # what it raises, all who wait for it raise


def _touch(arena: Arena, part: int, parts: int, touched: Latch) -> None:
    try:
        arena.touch(part, parts)
    finally:
        touched.open()


def _allocate(capacity_bytes: int, available_bytes: int | None) -> list[Arena]:
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
