"""The host side of a save: from arrays of any backend to a filled arena.

Owns what is compiled once per structure of the state, and the arenas; notices when the
structure changes and compiles anew.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from stepsave.format.blueprint import Blueprint
from stepsave.format.planning import Share, deal_layout
from stepsave.format.records import LeafSpec
from stepsave.snapshot.arena import Arena, ArenaPool, Claim
from stepsave.snapshot.arrays import (
    ArrayForm,
    HostArray,
    device_name,
    dtype_name,
    unwrap,
    view_on_host,
)
from stepsave.snapshot.contents import Attention
from stepsave.snapshot.filling import Filling
from stepsave.snapshot.pages import Bytes, Pages
from stepsave.snapshot.selection import Selection, Team
from stepsave.snapshot.staging import SnapshotMode, Source, Stager, choose_stager
from stepsave.threads import Call, Crew

__all__ = ("Capture", "Snapshot")

_logger = logging.getLogger("stepsave")

Paths = Sequence[tuple[str, ...]]
Views = Sequence[HostArray | ArrayForm]


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """A state in host memory, or on its way there, all of one step.

    Attributes:
        blueprint: The layout of the backup.
        share: What of it lies in the arena, and by which layout.
        arena: The buffer, the save's as long as its claim is not over.
        filling: How far it has come.
    """

    blueprint: Blueprint
    share: Share
    arena: Arena
    filling: Filling


@dataclasses.dataclass(frozen=True, slots=True)
class _Structure:
    """What is compiled once per structure of the state.

    One object, replaced as a whole: an interruption leaves the one before or this one.
    """

    selection: Selection | None
    paths: Paths
    dtypes: list[np.dtype[Any]]
    shapes: list[tuple[int, ...]]
    split: list[int]  # leaves of several chunks
    blueprint: Blueprint
    share: Share
    attention: Attention

    def fits(self, selection: Selection | None, paths: Paths, arrays: Views) -> bool:
        if selection is not self.selection:
            return False
        if paths is not self.paths and list(paths) != list(self.paths):
            return False
        # Two lists, compared in C: a model has thousands of variables.
        return [array.dtype for array in arrays] == self.dtypes and [
            array.shape for array in arrays
        ] == self.shapes


class Capture:
    """Takes snapshots. Used by one thread, which may be interrupted anywhere."""

    def __init__(
        self,
        crew: Crew,
        drain: Callable[[], None],
        mode: SnapshotMode = "auto",
        team: Team | None = None,
    ) -> None:
        """Makes nothing yet: all sizes follow from the first state.

        Args:
            crew: Threads that help to copy.
            drain: Waits until no snapshot is in use, before arenas are made anew.
            mode: Where snapshots are taken.
            team: The processes that save together; None if this one saves everything.
        """
        self._team = team
        self._selection: Selection | None = None
        self._crew = crew
        self._mode: SnapshotMode = mode
        self._stager: Stager | None = None
        self._is_chosen = False
        self._filling: Filling | None = None
        self._pinning: tuple[list[Bytes], Call[None]] | None = None
        self._pinned: Call[None] | None = None  # the last of these that went well
        self._drain = drain
        self._pool: ArenaPool | None = None
        self._restored: Pages | None = None
        self._structure: _Structure | None = None
        self._items: Mapping[str, Mapping[str, str]] = {}

    @property
    def arena_count(self) -> int:
        return self._pool.count if self._pool else 0

    @property
    def arena_bytes(self) -> int:
        return self._pool.capacity_bytes if self._pool else 0

    def attach(self, items: Mapping[str, Mapping[str, str]]) -> None:
        """Sets the constant checkpointables of all blueprints from now on."""
        if items != self._items:
            self._structure = None
            self._items = items

    def take_over(self, restored: Pages) -> None:
        """Uses memory that a backup was restored into for an arena, if none were made yet."""
        if self._pool is None:
            self._restored = restored

    def prepare(self, paths: Paths, leaves: Sequence[Any]) -> None:
        """Compiles the layout and makes the arenas; their pages come in the background."""
        paths, leaves, selection = self._select(paths, unwrap(leaves))
        leaves, arrays = self._view(paths, leaves, selection)
        pool, structure = self._fit(paths, arrays, device_name(leaves), selection)
        pool.bind(structure.share.plan)
        if self._stager is not None:
            self._stager.prepare(leaves)

    def take(
        self, paths: Paths, leaves: Sequence[Any], claim: Claim, *, block: bool
    ) -> Snapshot | None:
        """Takes a snapshot. On return the state may be changed.

        It is in the arena then; or, of a state that is staged, most is still on its way.

        Args:
            paths: Where each leaf belongs. The same object again saves the comparison.
            leaves: The arrays.
            claim: Of the save that the snapshot is for.
            block: Whether to wait for a free arena; else None is returned if there is none.
        """
        # Before anything is asked of the device: a save to be skipped must cost nothing.
        arena = self._pool.acquire(claim, block=block) if self._pool else None
        if self._pool is not None and arena is None:
            return None
        paths, leaves, selection = self._select(paths, unwrap(leaves))
        leaves, arrays = self._view(paths, leaves, selection)
        lender = self._pool
        pool, structure = self._fit(paths, arrays, device_name(leaves), selection)
        if arena is None or pool is not lender:  # the arenas were made anew
            arena = pool.acquire(claim, block=True)
        assert arena is not None
        arena.bind(structure.share.plan)
        if self._stager is not None:
            arena.settle(by_device=True)
            self._wait_pinned(pool)
        source = self._source(leaves, arrays, structure, arena)
        stager = self._stager
        is_led = stager is not None and not stager.blocks
        filling = self._filling = arena.begin(source, structure.attention, is_led=is_led)
        if stager is None or stager.blocks:
            pool.fill(filling)
        else:
            pool.lead(filling)
            stager.release()
        return Snapshot(structure.blueprint, structure.share, arena, filling)

    def free_device_memory(self) -> None:
        """Gives up the copy on a device, when it is on the host; the next snapshot makes another.

        What is compiled for it stays.
        """
        if self._stager is not None and self._filling is not None:
            self._filling.wait_quiet()
            self._stager.free()

    def close(self) -> None:
        """Lets go of the arenas. No snapshot may be in use."""
        self._drop_pool()
        self._restored = None
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def _drop_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._end_pinning()
        if self._stager is not None:
            self._stager.unpin()  # before the memory goes
        self._pool = None

    def _pin(self) -> None:
        """Has the arenas made fast targets for transfers, in the background."""
        stager, pool = self._stager, self._pool
        if stager is None or pool is None:
            return
        memories = pool.memories

        def pin() -> None:
            pool.wait_touched()  # registering pages that others touch takes longer
            stager.pin(memories)

        self._pinning = memories, self._crew.begin(pin)

    def _end_pinning(self) -> None:
        if self._pinning is not None:
            self._pinning[1].done.wait()
            self._pinning = None

    def _wait_pinned(self, pool: ArenaPool) -> None:
        """Returns when transfers to the arenas are fast, as far as they can be.

        Raises:
            ArenaMemoryError: If none to one of them could be trusted.
        """
        if self._pinning is None or list(map(id, self._pinning[0])) != list(map(id, pool.memories)):
            self._pin()
        if self._pinning is not None and self._pinning[1] is not self._pinned:
            pool.hurry()  # what it waits for would rest in favour of a training that starts
            try:
                self._pinning[1].take()
            except BaseException:
                self._pinning = None  # or the next save would go where nothing can be trusted
                raise
            self._pinned = self._pinning[1]

    def _select(
        self, paths: Paths, leaves: Sequence[Any]
    ) -> tuple[Paths, Sequence[Any], Selection | None]:
        """Returns what of a state this process captures; None for all of it, array by array."""
        if not Selection.is_needed(leaves, self._team):
            return paths, leaves, None
        selection = self._selection
        if selection is None or not selection.fits(paths, leaves):
            selection = self._selection = Selection(paths, leaves, self._team)
        return selection.paths, selection.parts(leaves), selection

    def _view(
        self, paths: Paths, leaves: Sequence[Any], selection: Selection | None
    ) -> tuple[Sequence[Any], Views]:
        """The leaves, and they on the host, or what they will be there if they are staged."""
        if self._stager is not None and not self._stager.accepts(leaves):
            self._drain()
            self._end_pinning()
            self._is_chosen = False
        if not self._is_chosen:
            mode = self._mode if leaves else "auto"
            self._stager = choose_stager(leaves, mode, self._stager)
            self._pin()
            self._is_chosen = True
        if self._stager is None:
            views = view_on_host(paths, leaves)
            return leaves, views if selection is None else selection.cut(views)
        if selection is not None:
            leaves = selection.cut_on_device(list(leaves))
        return leaves, self._stager.describe(paths, leaves)

    def _source(
        self, leaves: Sequence[Any], arrays: Views, structure: _Structure, arena: Arena
    ) -> Source:
        if self._stager is None:
            views = cast("list[HostArray]", arrays)
            for leaf in structure.split:  # it is read once per chunk
                views[leaf] = np.ascontiguousarray(views[leaf])
            return views.__getitem__
        if self._filling is not None:
            self._filling.wait_quiet()  # there is one copy on the device
        return self._stager.begin(leaves, structure.share.plan, arena.bytes)

    def _fit(
        self,
        paths: Paths,
        arrays: Views,
        device: str | None,
        selection: Selection | None,
    ) -> tuple[ArenaPool, _Structure]:
        """Returns arenas and what was compiled for these arrays, those in use if they fit."""
        pool, structure = self._pool, self._structure
        if pool is not None and structure is not None and structure.fits(selection, paths, arrays):
            return pool, structure
        if selection is None:
            specs = [
                LeafSpec(path, array.shape, dtype_name(path, array))
                for path, array in zip(paths, arrays, strict=True)
            ]
            deal = deal_layout(specs)
            whole, share, holding = deal.plan, deal.share(0), None
        else:
            whole, share, holding = selection.plan, selection.share, selection.holding
        plan = share.plan
        if structure is not None:
            _logger.debug(
                "the structure of the state changed: layout compiled anew, %d arrays, %d shards",
                len(whole.leaves),
                whole.shard_count,
            )
        if pool is not None and pool.capacity_bytes < plan.arena_bytes:
            self._drain()
            self._drop_pool()  # before new ones are made: there may be no room for both
            pool = None
        if pool is None:
            pool = self._pool = ArenaPool(plan, self._crew, self._restored)
            self._restored = None
            self._pin()
        chunks = collections.Counter(chunk.leaf for chunk in plan.chunks)
        structure = self._structure = _Structure(
            selection,
            paths,
            [array.dtype for array in arrays],
            [array.shape for array in arrays],
            [leaf for leaf, count in chunks.items() if count > 1],
            Blueprint(whole, self._items, device, holding),
            share,
            Attention(),
        )
        return pool, structure
