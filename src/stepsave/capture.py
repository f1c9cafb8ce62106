"""The host side of a save: from arrays of any backend to a filled arena.

Owns what is compiled once per structure of the state, and the arenas; notices when the
structure changes and compiles anew.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stepsave.arena import Arena, ArenaPool
from stepsave.commit import Blueprint
from stepsave.filling import Filling
from stepsave.layout import compile_layout
from stepsave.snapshot import HostArray, device_name, dtype_name, view_on_host
from stepsave.spec import LeafSpec

__all__ = ("Capture", "Snapshot")

_logger = logging.getLogger("stepsave")

Paths = Sequence[tuple[str, ...]]


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

    def __init__(self, drain: Callable[[], None]) -> None:
        """Makes nothing yet: all sizes follow from the first state.

        Args:
            drain: Waits until no snapshot is in use, before arenas are made anew.
        """
        self._drain = drain
        self._pool: ArenaPool | None = None
        self._blueprint: Blueprint | None = None
        self._items: Mapping[str, Mapping[str, str]] = {}
        self._paths: Paths = ()
        self._dtypes: list[np.dtype[Any]] = []
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
        pool, blueprint = self._fit(paths, view_on_host(paths, leaves), device_name(leaves))
        pool.bind(blueprint.plan)

    def begin(self, paths: Paths, leaves: Sequence[Any], *, block: bool) -> Snapshot | None:
        """Begins a snapshot; `Snapshot.complete` copies the state.

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
            arrays = view_on_host(paths, leaves)
            if pool is None or blueprint is None or not self._fits(paths, arrays):
                if pool is not None and arena is not None:
                    pool.release(arena)
                    arena = None
                pool, blueprint = self._fit(paths, arrays, device_name(leaves))
                arena = pool.acquire(block=True)
            assert arena is not None
            arena.bind(blueprint.plan)
            for leaf in self._split:  # it is read once per chunk
                arrays[leaf] = np.ascontiguousarray(arrays[leaf])
            return _lease(blueprint, pool, arena, arrays)
        except BaseException:
            if pool is not None and arena is not None:
                pool.release(arena)
            raise

    def close(self) -> None:
        """Lets go of the arenas. No snapshot may be in use."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _fits(self, paths: Paths, arrays: list[HostArray]) -> bool:
        if self._blueprint is None:
            return False
        if paths is not self._paths and list(paths) != list(self._paths):
            return False
        leaves = self._blueprint.plan.leaves
        return all(
            array.shape == leaf.shape and array.dtype == dtype
            for array, leaf, dtype in zip(arrays, leaves, self._dtypes, strict=True)
        )

    def _fit(
        self, paths: Paths, arrays: list[HostArray], device: str | None
    ) -> tuple[ArenaPool, Blueprint]:
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
            self._pool.close()
            self._pool = None  # before new ones are made: there may be no room for both
        pool = self._pool = self._pool or ArenaPool(plan)
        self._blueprint = Blueprint.compile(plan, self._items, device)
        self._paths = paths
        self._dtypes = [array.dtype for array in arrays]
        chunks = collections.Counter(chunk.leaf for chunk in plan.chunks)
        self._split = [leaf for leaf, count in chunks.items() if count > 1]
        return pool, self._blueprint


def _lease(
    blueprint: Blueprint, pool: ArenaPool, arena: Arena, arrays: list[HostArray]
) -> Snapshot:
    filling = arena.begin(arrays.__getitem__)
    return Snapshot(
        blueprint,
        arena,
        filling,
        complete=lambda: pool.fill(filling),
        release=lambda: pool.release(arena),
    )
