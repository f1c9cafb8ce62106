"""From an arena to durable shards: by direct writes, or by tensorstore."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable

from stepsave.format import orbax
from stepsave.format.records import LayoutPlan
from stepsave.snapshot.capture import Snapshot
from stepsave.snapshot.contents import Contents
from stepsave.store.local import LocalStore
from stepsave.store.places import Store
from stepsave.store.shard_array import ShardArray
from stepsave.threads import Crew

__all__ = ("Shards",)

_WriteOne = Callable[[int, Snapshot, "Contents | None"], int]
"""Writes what has changed in a shard of a snapshot, by its number in the arena."""


class Shards:
    """How shards are written in one place. For the keeper's thread."""

    def __init__(self, store: Store, helpers: Crew, *, direct: bool, lanes: int) -> None:
        """Opens nothing yet.

        Args:
            store: The place.
            helpers: Threads that write too.
            direct: Whether to bypass the page cache.
            lanes: How many threads write at once.
        """
        self._store = store
        self._helpers = helpers
        self._direct = direct
        self._lanes = lanes

    def write(
        self, directory: str, snapshot: Snapshot, known: Contents | None
    ) -> tuple[tuple[int, ...], int]:
        """Writes the shards of a snapshot durably, as it is being filled.

        Args:
            directory: Name of the backup.
            snapshot: The state.
            known: What the shards hold already; None if that is not known.

        Returns:
            What `BackupRecord.shard_digests` describes, and how many bytes were written.
        """
        share = snapshot.share
        write = self._open(directory, snapshot.blueprint.plan, share.shards.start)
        count = len(share.shards)
        digests, written_bytes = [0] * count, [0] * count

        def write_one(number: int) -> None:
            written_bytes[number] = write(number, snapshot, known)
            digests[number] = snapshot.arena.digest(number)

        self._helpers.share(range(count), write_one, helpers=max(0, min(self._lanes, count) - 1))
        return tuple(digests), sum(written_bytes)

    def _open(self, directory: str, plan: LayoutPlan, first: int) -> _WriteOne:
        store = self._store
        if self._direct and isinstance(store, LocalStore):
            shards = store
        else:
            shards = ShardArray(store, directory, plan)

        def write_changed(number: int, snapshot: Snapshot, known: Contents | None) -> int:
            data = snapshot.arena.shard(number)
            ranges = snapshot.filling.ranges(number, known)
            begin = next(ranges, None)
            if begin is None:
                return 0
            if isinstance(shards, LocalStore):
                path = f"{directory}/{orbax.shard_path(first + number)}"
                return shards.write_direct(path, data.data, itertools.chain((begin,), ranges))
            collections.deque(ranges, maxlen=0)  # until all is there
            shards.write(first + number, data)
            return plan.shard_bytes

        return write_changed
