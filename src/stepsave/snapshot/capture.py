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
from stepsave.format.layout import compile_layout
from stepsave.format.records import LeafSpec
from stepsave.snapshot.arena import Arena, ArenaPool
from stepsave.snapshot.arrays import (
    ArrayForm,
    HostArray,
    device_name,
    dtype_name,
    unwrap,
    view_on_host,
)
from stepsave.snapshot.filling import Filling
from stepsave.snapshot.staging import SnapshotMode, Source, Stager, choose_stager

__all__ = ("Capture", "Snapshot")

_logger = logging.getLogger("stepsave")

Paths = Sequence[tuple[str, ...]]
Views = Sequence[HostArray | ArrayForm]


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """A state in host memory, or on its way there, all of one step.

    Attributes:
        blueprint: The layout that it lies in the arena by.
        arena: The buffer, leased until `release` is called.
        filling: How far it has come.
        complete: Returns when the state may be changed.
        release: Gives the arena back.
    """

    blueprint: Blueprint
    arena: Arena
    filling: Filling
    complete: Callable[[], None]
    release: Callable[[], None]


class Capture:
    """Takes snapshots. Used by one thread; arenas may be released by another."""

    def __init__(self, drain: Callable[[], None], mode: SnapshotMode = "auto") -> None:
        """Makes nothing yet: all sizes follow from the first state.

        Args:
            drain: Waits until no snapshot is in use, before arenas are made anew.
            mode: Where snapshots are taken.
        """
        self._mode: SnapshotMode = mode
        self._stager: Stager | None = None
        self._is_chosen = False
        self._filling: Filling | None = None
        self._drain = drain
        self._pool: ArenaPool | None = None
        self._blueprint: Blueprint | None = None
        self._items: Mapping[str, Mapping[str, str]] = {}
        self._paths: Paths = ()
        self._dtypes: list[np.dtype[Any]] = []
        self._shapes: list[tuple[int, ...]] = []
        self._split: list[int] = []  # leaves of several chunks

    @property
    def arena_count(self) -> int:
        return self._pool.count if self._pool else 0

    @property
    def arena_bytes(self) -> int:
        return self._pool.capacity_bytes if self._pool else 0

    def attach(self, items: Mapping[str, Mapping[str, str]]) -> None:
        """Sets the constant checkpointables of all blueprints from now on."""
        if items != self._items:
            self._items = items
            self._blueprint = None

    def prepare(self, paths: Paths, leaves: Sequence[Any]) -> None:
        """Compiles the layout and makes the arenas, all pages present."""
        arrays = self._view(paths, unwrap(leaves))
        pool, blueprint = self._fit(paths, arrays, device_name(leaves))
        pool.bind(blueprint.plan)
        if self._stager is not None:
            self._stager.prepare(unwrap(leaves))

    def begin(self, paths: Paths, leaves: Sequence[Any], *, block: bool) -> Snapshot | None:
        """Begins a snapshot; `Snapshot.complete` makes it independent of the state.

        Args:
            paths: Where each leaf belongs. The same object again saves the comparison.
            leaves: The arrays.
            block: Whether to wait for a free arena; else None is returned if there is none.
        """
        # Before anything is asked of the device: a save to be skipped must cost nothing.
        arena = self._pool.acquire(block=block) if self._pool else None
        if self._pool is not None and arena is None:
            return None
        pool, blueprint = self._pool, self._blueprint
        try:
            leaves = unwrap(leaves)
            arrays = self._view(paths, leaves)
            if pool is None or blueprint is None or not self._fits(paths, arrays):
                if pool is not None and arena is not None:
                    pool.release(arena)
                    arena = None
                pool, blueprint = self._fit(paths, arrays, device_name(leaves))
                arena = pool.acquire(block=True)
            assert arena is not None
            arena.bind(blueprint.plan)
            return self._lease(blueprint, pool, arena, self._source(leaves, arrays, arena))
        except BaseException:
            if pool is not None and arena is not None:
                pool.release(arena)
            raise

    def close(self) -> None:
        """Lets go of the arenas. No snapshot may be in use."""
        self._drop_pool()
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def _drop_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._stager is not None:
            self._stager.unpin()  # before the memory goes
        self._pool = None

    def _pin(self) -> None:
        if self._stager is not None and self._pool is not None:
            self._stager.pin(self._pool.memories)

    def _view(self, paths: Paths, leaves: Sequence[Any]) -> Views:
        """The leaves on the host, or what they will be there if they are staged."""
        if self._stager is not None and not self._stager.accepts(leaves):
            self._drain()
            self._stager.close()
            self._stager, self._is_chosen = None, False
        if not self._is_chosen:
            self._stager = choose_stager(leaves, self._mode)
            self._is_chosen = True
            self._pin()
        if self._stager is None:
            return view_on_host(paths, leaves)
        return self._stager.describe(paths, leaves)

    def _source(self, leaves: Sequence[Any], arrays: Views, arena: Arena) -> Source:
        assert self._blueprint is not None
        if self._stager is None:
            views = cast("list[HostArray]", arrays)
            for leaf in self._split:  # it is read once per chunk
                views[leaf] = np.ascontiguousarray(views[leaf])
            return views.__getitem__
        if self._filling is not None:
            self._filling.wait_ended()  # there is one copy on the device
        return self._stager.begin(leaves, self._blueprint.plan, arena.bytes)

    def _lease(
        self, blueprint: Blueprint, pool: ArenaPool, arena: Arena, source: Source
    ) -> Snapshot:
        filling = self._filling = arena.begin(source)
        waits = self._stager is None or self._stager.blocks
        complete = pool.fill if waits else pool.fill_later
        return Snapshot(
            blueprint,
            arena,
            filling,
            complete=lambda: complete(filling),
            release=lambda: pool.release(arena, filling),
        )

    def _fits(self, paths: Paths, arrays: Views) -> bool:
        if self._blueprint is None:
            return False
        if paths is not self._paths and list(paths) != list(self._paths):
            return False
        # Two lists, compared in C: a model has thousands of variables.
        return [array.dtype for array in arrays] == self._dtypes and [
            array.shape for array in arrays
        ] == self._shapes

    def _fit(self, paths: Paths, arrays: Views, device: str | None) -> tuple[ArenaPool, Blueprint]:
        """Returns arenas and a blueprint for these arrays, those in use if they fit."""
        if self._pool is not None and self._blueprint is not None and self._fits(paths, arrays):
            return self._pool, self._blueprint
        specs = [
            LeafSpec(path, array.shape, dtype_name(path, array))
            for path, array in zip(paths, arrays, strict=True)
        ]
        plan = compile_layout(specs)
        if self._pool is not None:
            _logger.debug(
                "the structure of the state changed: layout compiled anew, %d arrays, %d shards",
                len(specs),
                plan.shard_count,
            )
        if self._pool is not None and self._pool.capacity_bytes < plan.arena_bytes:
            self._drain()
            self._drop_pool()  # before new ones are made: there may be no room for both
        if self._pool is None:
            self._pool = ArenaPool(plan)
            self._pin()
        self._blueprint = Blueprint.compile(plan, self._items, device)
        self._paths = paths
        self._dtypes = [array.dtype for array in arrays]
        self._shapes = [array.shape for array in arrays]
        chunks = collections.Counter(chunk.leaf for chunk in plan.chunks)
        self._split = [leaf for leaf, count in chunks.items() if count > 1]
        return self._pool, self._blueprint
