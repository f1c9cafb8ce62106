"""Which bytes of a backup a process reads, and where they lie in memory.

All of them; or, of arrays of which it needs a part, the chunks of that. With them come the
checksums of all chunks of the shard, which prove that they belong to this very save.
"""

from __future__ import annotations

import bisect
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from stepsave.format.layout import CHECKSUM_BYTES, PAGE_BYTES, Grid, chunk_count
from stepsave.format.records import DTYPES, ChunkSpec, LayoutPlan, LeafSpec
from stepsave.snapshot.arrays import HostArray, SavedArray, ScatteredArray
from stepsave.snapshot.pages import Bytes

__all__ = ("Extent", "Extents", "Needs", "Regions", "shape_chunk", "view_leaves")

Region = Sequence[slice]
Regions = Mapping[tuple[str, ...], Sequence[Region]]
"""By path of an array what of it is needed, as parts with one slice per axis. Of others, all."""

_BRIDGE_BYTES = 64 << 10
"""What lies between two extents that are nearer is read too: one request is cheaper."""


@dataclasses.dataclass(frozen=True, slots=True)
class Needs:
    """What of a backup a process needs, and who waits for it.

    Attributes:
        regions: Says, of the arrays of a backup, which parts are needed; None if all of all.
        on_read: Told how many bytes were read, of how many, by one thread of several at a time:
            at the beginning, and once for each piece of some MiB. None if nobody waits.
    """

    regions: Callable[[Sequence[LeafSpec]], Regions] | None = None
    on_read: Callable[[int, int], object] | None = None

    def counter(self, of_bytes: int) -> Callable[[int], None] | None:
        """Returns what adds up the sizes of pieces and tells the sum; None if nobody waits."""
        on_read = self.on_read
        if on_read is None:
            return None
        guard, done_bytes = threading.Lock(), 0

        def add(size_bytes: int) -> None:
            nonlocal done_bytes
            with guard:
                done_bytes += size_bytes
                on_read(done_bytes, of_bytes)

        add(0)
        return add


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """Some bytes of a shard, in whole pages.

    Attributes:
        begin_bytes: Where they begin in the shard.
        end_bytes: Where they end.
        memory_bytes: Where they go in memory.
    """

    begin_bytes: int
    end_bytes: int
    memory_bytes: int


class Extents:
    """What is read of a backup.

    Attributes:
        size_bytes: How much that is.
        is_all: Whether it is everything, as it lies in the arena.
    """

    def __init__(self, plan: LayoutPlan, regions: Regions | None = None) -> None:
        """Decides what is read.

        Args:
            plan: The layout.
            regions: What is needed.
        """
        self._shard_bytes = plan.shard_bytes
        wanted = None if regions is None else _wanted(plan, regions)
        self._of_shard: list[list[Extent]] = []
        self.size_bytes = 0
        for number in range(plan.shard_count):
            ranges: Iterable[tuple[int, int]] = [(0, plan.shard_bytes)]
            if wanted is not None:
                ranges = _join(_needed(plan, number, wanted))
            extents: list[Extent] = []
            for begin, end in ranges:
                extents.append(Extent(begin, end, self.size_bytes))
                self.size_bytes += end - begin
            self._of_shard.append(extents)
        self.is_all = self.size_bytes == plan.arena_bytes

    def of_shard(self, number: int) -> Sequence[Extent]:
        """Returns the extents of a shard, in order; none if nothing of it is needed."""
        return self._of_shard[number]

    def find(self, offset_bytes: int, size_bytes: int) -> int | None:
        """Returns where some bytes of the arena lie in memory; None if not all are read."""
        shard, begin = divmod(offset_bytes, self._shard_bytes)
        extents = self._of_shard[shard]
        place = bisect.bisect_right(extents, begin, key=lambda extent: extent.begin_bytes) - 1
        if place < 0 or begin + size_bytes > extents[place].end_bytes:
            return None
        return extents[place].memory_bytes + begin - extents[place].begin_bytes


def _wanted(plan: LayoutPlan, regions: Regions) -> set[int]:
    """Returns the offsets of the chunks that are needed."""
    of_leaf = [regions.get(leaf.path) for leaf in plan.leaves]
    return {
        chunk.offset_bytes
        for chunk in plan.chunks
        if _is_needed(chunk, plan.chunk_shapes[chunk.leaf], of_leaf[chunk.leaf])
    }


def _is_needed(
    chunk: ChunkSpec, chunk_shape: Sequence[int], regions: Sequence[Region] | None
) -> bool:
    if regions is None:
        return True
    return any(
        all(
            at * size < cut.stop and cut.start < (at + 1) * size
            for at, size, cut in zip(chunk.grid, chunk_shape, region, strict=True)
        )
        for region in regions
    )


def _needed(plan: LayoutPlan, number: int, wanted: set[int]) -> Iterator[tuple[int, int]]:
    chunks = plan.shard_chunks[number]
    if not any(chunk.offset_bytes in wanted for chunk in chunks):
        return
    for chunk in chunks:
        begin = chunk.offset_bytes - number * plan.shard_bytes
        end = begin + chunk.stored_bytes
        yield (begin if chunk.offset_bytes in wanted else end), end + CHECKSUM_BYTES


def _join(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Widens ranges to whole pages, and joins those that are near each other."""
    pages = (
        (begin // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES)
        for begin, end in ranges
    )
    joined: tuple[int, int] | None = None
    for begin, end in pages:
        if joined is not None and begin - joined[1] > _BRIDGE_BYTES:
            yield joined
            joined = None
        joined = (begin, end) if joined is None else (joined[0], max(joined[1], end))
    if joined is not None:
        yield joined


def view_leaves(plan: LayoutPlan, memory: Bytes, extents: Extents) -> list[SavedArray]:
    """Returns the leaves as views of the memory that they were read into."""
    chunks: list[dict[Grid, HostArray]] = [{} for _ in plan.leaves]
    for chunk in plan.chunks:
        at = extents.find(chunk.offset_bytes, chunk.data_bytes)
        if at is not None:
            data = memory[at : at + chunk.data_bytes]
            chunks[chunk.leaf][chunk.grid] = shape_chunk(plan, chunk, data)
    leaves: list[SavedArray] = []
    for number, leaf in enumerate(plan.leaves):
        pieces, shape = chunks[number], plan.chunk_shapes[number]
        if 0 in leaf.shape:
            leaves.append(np.empty(leaf.shape, DTYPES[leaf.dtype]))
        elif [*pieces] == [(0,) * len(shape)] and chunk_count(leaf, shape) == 1:
            leaves.append(next(iter(pieces.values())))
        else:
            leaves.append(ScatteredArray(leaf.shape, DTYPES[leaf.dtype], shape, pieces))
    return leaves


def shape_chunk(plan: LayoutPlan, chunk: ChunkSpec, data: Bytes) -> HostArray:
    """Returns the data of a chunk, without padding, as the block of its array that it is."""
    leaf, chunk_shape = plan.leaves[chunk.leaf], plan.chunk_shapes[chunk.leaf]
    shape = [
        min(size, total - at * size)
        for at, size, total in zip(chunk.grid, chunk_shape, leaf.shape, strict=True)
    ]
    return data.view(DTYPES[leaf.dtype]).reshape(shape)
