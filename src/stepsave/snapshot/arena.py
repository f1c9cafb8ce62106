"""Host buffers for snapshots: two arenas, so that one can be filled while the other is written."""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Sequence

from stepsave.errors import ArenaMemoryError
from stepsave.format.records import LayoutPlan
from stepsave.snapshot.contents import Attention, Contents, Held
from stepsave.snapshot.filling import Filling
from stepsave.snapshot.pages import HUGE_PAGE_BYTES, Bytes, Pages, Touching, available_bytes
from stepsave.snapshot.runs import Run, Source, compile_runs, digest_shard, gaps
from stepsave.threads import Crew, Fate, Latch

__all__ = ("Arena", "ArenaPool", "Claim", "copy_thread_count", "pages_for")

# Room for the few metrics that Keras on TensorFlow builds only in the first step: the
# layout then grows by some bytes, and the arenas need not be made again.
_SLACK_BYTES = 1 << 20

_MOST_SPARE = 1.5
"""How many times larger than an arena memory may be that is to be one: one of several processes may
have restored all of a state of which it saves a part."""


def copy_thread_count() -> int:
    """Threads that saturate memory bandwidth on most machines, within the process's share."""
    if hasattr(os, "sched_getaffinity"):
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)


def pages_for(plan: LayoutPlan) -> Pages:
    """Returns memory that is an arena's, as large as one for this plan is made.

    Raises:
        OSError: If the system has no room, or a limit forbids it.
    """
    return Pages(_capacity_bytes(plan))


def _capacity_bytes(plan: LayoutPlan) -> int:
    return -(-(plan.arena_bytes + _SLACK_BYTES) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


_Bound = tuple[LayoutPlan, list[Run], list[list[int]]]
"""A plan, its runs in an arena, and the sizes of their pieces."""


class Arena:
    """One page-aligned host buffer, seen through a layout plan."""

    def __init__(self, pages: Pages, *, is_blank: bool = True) -> None:
        """Touches nothing.

        Args:
            pages: The memory.
            is_blank: Whether it is known to be zeros.
        """
        self.pages = pages
        self.capacity_bytes = pages.size_bytes
        self.bytes = pages.view()
        self.claim: Claim | None = None
        self.filling: Filling | None = None  # the last one
        self.touching: Touching | None = None
        self._is_blank = is_blank
        # In one: no interruption leaves the views of one plan under the name of another.
        self._bound: _Bound | None = None
        self._contents: Contents = []  # what its pieces are known to hold
        self._stays = True

    @property
    def is_free(self) -> bool:
        """Whether neither a save nor somebody who restored has a hold on it."""
        return self.is_unclaimed and not self.pages.is_lent

    @property
    def is_unclaimed(self) -> bool:
        """Whether no save has a hold on it."""
        return self.claim is None or self.claim.is_over

    def bind(self, plan: LayoutPlan) -> None:
        """Prepares the views through which a state of this plan is copied in; writes nothing."""
        bound = self._bound
        if bound is None or bound[0] is not plan:
            self._is_blank = self._is_blank and bound is None
            self._contents = []
            runs = compile_runs(plan, self.bytes)
            self._bound = plan, runs, [run.piece_bytes for run in runs]

    def settle(self, *, by_device: bool = False) -> None:
        """Has nobody write to the arena but those who fill it with a state of the bound plan.

        Args:
            by_device: Whether a device, or somebody for it, writes from now on: what is in the
                arena does not stay there.
        """
        assert self._bound is not None
        self._stays = self._stays and not by_device
        if self.touching is not None:
            self.touching.stop()
            self.touching = None
        if not self._is_blank:
            for begin, end in gaps(self._bound[0], self.capacity_bytes):
                self.bytes[begin:end] = 0  # whatever another plan had there
            self._is_blank = True

    def begin(self, source: Source, attention: Attention, *, is_led: bool = False) -> Filling:
        """Begins to fill the arena with a state of the bound plan.

        Args:
            source: The state.
            attention: Which runs to ask whether they have changed.
            is_led: Whether threads of the crew do all of it.
        """
        assert self._bound is not None
        plan, runs, sizes = self._bound
        self.settle()
        held = Held(sizes, self._contents, stays=self._stays)
        self._contents, self._stays = held.now, True
        self.filling = Filling(runs, plan, source, held, attention, is_led=is_led)
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
        self._fate = Fate()
        self.released = Latch()

    @property
    def is_over(self) -> bool:
        return self.released.is_open

    def accept(self) -> bool:
        """For the thread that writes: whether the save is its to write."""
        return self._fate.accept()

    def release(self) -> None:
        """For the thread that writes: the arena may be used again."""
        self.released.open()

    def drop(self) -> bool:
        """For the caller: whether the save is given up, and nobody will write it."""
        is_dropped = self._fate.drop()
        if is_dropped:
            self.released.open()
        return is_dropped


class ArenaPool:
    """The arenas of one checkpointer: lends them out, one save each.

    Nothing here says which are free: that follows from the claims on them. So none is lost,
    whatever is interrupted. Used by one thread; claims end on others.
    """

    def __init__(self, plan: LayoutPlan, crew: Crew, restored: Pages | None = None) -> None:
        """Makes two arenas, or one when memory is short, and has the crew touch them.

        Args:
            plan: Of the states that they are for.
            crew: Threads that touch, and help to copy.
            restored: Memory that a backup was restored into, to be one of them if it is large
                enough; when those who have views of it have let go of them.

        Raises:
            ArenaMemoryError: If not even one fits.
        """
        self._crew = crew
        self._threads = copy_thread_count()
        self.capacity_bytes = _capacity_bytes(plan)
        self._arenas: list[Arena] = []
        most_bytes = _MOST_SPARE * self.capacity_bytes
        if restored is not None and self.capacity_bytes <= restored.size_bytes <= most_bytes:
            self.capacity_bytes = restored.size_bytes
            self._arenas.append(Arena(restored, is_blank=False))
        available = self._available_bytes()
        while len(self._arenas) < 2 and self._add_one(available):
            available = None if available is None else available - self.capacity_bytes
        crew.put(functools.partial(_touch, list(self._arenas)))
        if not self._arenas:
            raise ArenaMemoryError(
                f"A host copy of the training state needs {_mebibytes(self.capacity_bytes)}, but "
                f"available memory is {_mebibytes(available)}. Free memory, use a larger machine, "
                "or save a smaller state."
            )
        if len(self._arenas) == 1:
            warnings.warn(
                "stepsave: two host copies of the training state need 2 x "
                f"{_mebibytes(self.capacity_bytes)}, but available memory is "
                f"{_mebibytes(available)} beside the first. Using one: a save that is due while "
                "the one before it is being written has to wait for it.",
                stacklevel=2,
            )

    @property
    def count(self) -> int:
        return len(self._arenas)

    @property
    def memories(self) -> list[Bytes]:
        """The memory of all arenas: the same objects as long as these are the same."""
        return [arena.bytes for arena in self._arenas]

    def hurry(self) -> None:
        """Has pages come as fast as they can: a save waits for those who wait for them."""
        for arena in self._arenas:
            touching = arena.touching
            if touching is not None:
                touching.hurry()

    def wait_touched(self) -> None:
        """Returns when all pages are present that nobody needed before."""
        for arena in self._arenas:
            touching = arena.touching
            if touching is not None:
                touching.wait()

    def acquire(self, claim: Claim, *, block: bool) -> Arena | None:
        """Lends a free arena.

        Args:
            claim: Of the save; until it is over the arena is the save's.
            block: Whether to wait for one; else None is returned when all are in use.

        Raises:
            ArenaMemoryError: If all memory is still with somebody who restored, and there is no
                more.
        """
        while True:
            self._quiet_free()
            for arena in self._arenas:
                if arena.is_free:
                    arena.claim = claim
                    arena.pages.keep_from_children()
                    return arena
            if self._replace_lent():
                continue
            if not block:
                return None
            # Saves are written in the order in which they were begun: the other one is later.
            claims = [arena.claim for arena in self._arenas if arena.claim is not None]
            going_on = [claim for claim in claims if not claim.is_over]
            if going_on:  # else one has ended since
                min(going_on, key=lambda claim: claim.number).released.wait()

    def close(self) -> None:
        """Returns when nobody uses the memory any more. It goes when the last view of it does."""
        for arena in self._arenas:
            if arena.touching is not None:
                arena.touching.stop()
        self._quiet_free()

    def bind(self, plan: LayoutPlan) -> None:
        """Prepares the arenas for states of this plan, so that no save pays for it."""
        self._quiet_free()
        for arena in self._arenas:
            if arena.is_unclaimed:
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

    def _quiet_free(self) -> None:
        """Ends what an interrupted call may have left going on in arenas that are free."""
        for arena in self._arenas:
            if arena.is_unclaimed and arena.filling is not None:
                arena.filling.give_up()

    def _replace_lent(self) -> bool:
        """Makes another arena for one that is lent; tells whether there is one now.

        Those who restored may keep their arrays as long as they like.
        """
        lent = [arena for arena in self._arenas if arena.is_unclaimed and arena.pages.is_lent]
        if not lent:
            return False
        available = self._available_bytes()
        if self._add_one(available):
            self._arenas.remove(lent[0])
            self._crew.put(functools.partial(_touch, self._arenas[-1:]))
            return True
        if len(lent) < len(self._arenas):
            return False
        raise ArenaMemoryError(
            "The arrays of a restored backup are still in use, and another host copy of the "
            f"training state needs {_mebibytes(self.capacity_bytes)}, but available memory is "
            f"{_mebibytes(available)}. Let go of them (`del backup`) before the first save, or "
            "free memory."
        )

    def _add_one(self, available: int | None) -> bool:
        if available is not None and self.capacity_bytes > available:
            return False
        try:
            arena = Arena(Pages(self.capacity_bytes))
        except (OSError, MemoryError):  # an address-space limit, say
            return False
        arena.touching = Touching(arena.bytes)
        self._arenas.append(arena)
        return True

    def _available_bytes(self) -> int | None:
        # Read by the crew: an interruption must leave no file open.
        return self._crew.call(available_bytes)


def _touch(arenas: Sequence[Arena]) -> None:
    """Makes pages present, so that no snapshot pays for it: first those that are used first.

    One after the other: more threads would take the cores from the training that starts.
    """
    for arena in arenas:
        touching = arena.touching
        if touching is not None:
            touching.run()


def _mebibytes(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / 2**20:.0f} MiB"
