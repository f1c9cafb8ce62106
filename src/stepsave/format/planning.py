"""Compiles the shapes of a state into a plan: where each byte lies, once per structure.

The plan cuts large arrays into chunks and deals all chunks out over equal shards. Of a state that
is spread over the devices of several processes each process compiles the same plan by itself, from
what all of them know: no chunk crosses the border of what one device has, and each is dealt to one
process that has it. Nothing here touches a disk or an array.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import operator
from collections.abc import Iterable, Mapping, Sequence

from stepsave.format.layout import (
    CHECKSUM_BYTES,
    PAGE_BYTES,
    Grid,
    check_names,
    chunk_count,
    chunks_of,
)
from stepsave.format.records import ChunkSpec, LayoutPlan, LeafSpec

__all__ = (
    "Deal",
    "Part",
    "Share",
    "Spread",
    "block_of",
    "compile_layout",
    "deal_layout",
    "move",
    "room_bytes",
)

SHARD_TARGET_BYTES = 64 << 20
"""Large enough to amortise a file, small enough that two writers share one save."""

CHUNK_LIMIT_BYTES = SHARD_TARGET_BYTES // 4
"""No chunk is larger, so dealing them out leaves shards within a quarter of each other. But where
what one device has can be cut evenly only into many more pieces than that takes."""

ALIGNMENT_BYTES = 64
"""A cache line: keeps vectorised copies aligned whatever the dtype."""

_CHUNKS_PER_PROCESS = 16
"""At least, where the state is large enough: they then come out equal within a sixteenth."""

_SMALLEST_LIMIT_BYTES = 1 << 20
_MOST_PIECES = 8  # times as many as needed, before a chunk above the limit is the smaller evil


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """How an array lies on the devices of several processes: in blocks of one shape.

    Attributes:
        block_shape: The shape; its sizes divide those of the array.
        holders: The processes that have a block, in ascending order, by its place in the grid.
    """

    block_shape: Grid
    holders: Mapping[Grid, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Deal:
    """A plan, and who writes what of it.

    Attributes:
        plan: The plan.
        spreads: How each array lies.
        first_shards: By process, the first of its shards; they follow each other. One more at the
            end: the number of all.
    """

    plan: LayoutPlan
    spreads: tuple[Spread, ...]
    first_shards: tuple[int, ...]

    def share(self, process: int) -> Share:
        """Returns what one process captures and writes."""
        shards = range(*self.first_shards[process : process + 2])
        return _share(self, shards)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """An array that a process captures: a block of an array of the state, or a piece of one.

    Attributes:
        leaf: The array, by its number in the state.
        block: Which block of it.
        cut: Which piece of the block, one slice per axis; None for all of it.
    """

    leaf: int
    block: Grid
    cut: tuple[slice, ...] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What one process captures and writes of a state.

    Attributes:
        plan: Of its parts, in an arena that has its shards alone.
        parts: The parts, as the leaves of that plan. None if the leaves of the state are these.
        shards: Numbers of its shards in the backup.
    """

    plan: LayoutPlan
    parts: tuple[Part, ...] | None
    shards: range


def compile_layout(leaves: Sequence[LeafSpec]) -> LayoutPlan:
    """Decides where every leaf of a state of one process lies.

    Args:
        leaves: The arrays of the state. The same leaves give the same plan.

    Raises:
        InvalidStateError: If two leaves would get the same name, or a leaf is beyond what
            the format can hold.
    """
    return deal_layout(leaves).plan


def deal_layout(
    leaves: Sequence[LeafSpec], spreads: Sequence[Spread | None] | None = None, count: int = 1
) -> Deal:
    """Decides where every leaf lies, and which process writes it.

    Chunks are dealt to those who have them, what fewest have first, then the largest, each to
    whom has least so far; those of a process over its shards likewise (the LPT rule of Graham,
    1969). So processes and shards come out balanced, and the padding of equal shards is small.

    Args:
        leaves: The arrays of the state.
        spreads: How each lies on the devices; None for one that process 0 has as a whole.
        count: How many processes there are.

    Raises:
        InvalidStateError: As `compile_layout`.
    """
    check_names(leaves)
    spreads = [None] * len(leaves) if spreads is None else spreads
    whole = tuple(_whole(leaf) if s is None else s for leaf, s in zip(leaves, spreads, strict=True))
    limit_bytes = _limit_bytes(leaves, count)
    shapes = tuple(
        _chunk_shape(leaf, spread.block_shape, limit_bytes)
        for leaf, spread in zip(leaves, whole, strict=True)
    )
    loose: list[ChunkSpec] = []
    holders: list[tuple[int, ...]] = []
    for i, (leaf, spread, shape) in enumerate(zip(leaves, whole, shapes, strict=True)):
        for chunk in chunks_of(i, leaf, shape, spread.block_shape):
            loose.append(chunk)
            holders.append(spread.holders[block_of(chunk.grid, shape, spread.block_shape)])
    members, first_shards = _deal(loose, holders, count)
    shard_bytes = max(
        (_round_up(sum(room_bytes(loose[i]) for i in shard), PAGE_BYTES) for shard in members),
        default=0,
    )
    shard_bytes = max(shard_bytes, PAGE_BYTES)
    chunks = tuple(_place(loose, members, shard_bytes))
    plan = LayoutPlan(tuple(leaves), shapes, chunks, shard_bytes, len(members))
    return Deal(plan, whole, first_shards)


def _whole(leaf: LeafSpec) -> Spread:
    return Spread(leaf.shape, {(0,) * len(leaf.shape): (0,)})


def _place(
    loose: Sequence[ChunkSpec], members: Sequence[Sequence[int]], shard_bytes: int
) -> Iterable[ChunkSpec]:
    placed: dict[int, ChunkSpec] = {}
    for number, shard in enumerate(members):
        offset_bytes = number * shard_bytes
        for i in sorted(shard):  # in the order of the state: capture walks memory forward
            placed[i] = move(loose[i], loose[i].leaf, offset_bytes)
            offset_bytes += room_bytes(loose[i])
    return (placed[i] for i in range(len(loose)))


def move(
    chunk: ChunkSpec, leaf: int, offset_bytes: int, source_bytes: int | None = None
) -> ChunkSpec:
    """Returns a chunk as one of another leaf, elsewhere in the arena."""
    source = chunk.source_bytes if source_bytes is None else source_bytes
    stored_bytes = chunk.stored_bytes
    return ChunkSpec(leaf, chunk.grid, source, chunk.data_bytes, stored_bytes, offset_bytes)


def _share(deal: Deal, shards: range) -> Share:
    plan = deal.plan
    are_whole = (s.block_shape for s in deal.spreads), (leaf.shape for leaf in plan.leaves)
    if len(shards) == plan.shard_count and all(map(operator.eq, *are_whole)):
        return Share(plan, None, shards)
    mine = [chunk for number in shards for chunk in plan.shard_chunks[number]]
    blocks = [
        block_of(chunk.grid, plan.chunk_shapes[chunk.leaf], deal.spreads[chunk.leaf].block_shape)
        for chunk in mine
    ]
    held = collections.Counter(
        (chunk.leaf, block) for chunk, block in zip(mine, blocks, strict=True)
    )
    numbers: dict[tuple[int, Grid, Grid | None], int] = {}
    parts: list[Part] = []
    specs: list[LeafSpec] = []
    chunks: list[ChunkSpec] = []
    for chunk, block in zip(mine, blocks, strict=True):
        leaf, shape = plan.leaves[chunk.leaf], plan.chunk_shapes[chunk.leaf]
        block_shape = deal.spreads[chunk.leaf].block_shape
        of_block = LeafSpec(leaf.path, block_shape, leaf.dtype)
        is_all = held[chunk.leaf, block] == chunk_count(of_block, shape)
        number = numbers.setdefault((chunk.leaf, block, None if is_all else chunk.grid), len(parts))
        if number == len(parts):
            cut = None if is_all else _cut(chunk.grid, shape, block_shape)
            cut_shape = block_shape if cut is None else [one.stop - one.start for one in cut]
            parts.append(Part(chunk.leaf, block, cut))
            specs.append(LeafSpec(leaf.path, tuple(cut_shape), leaf.dtype))
        offset_bytes = chunk.offset_bytes - shards.start * plan.shard_bytes
        chunks.append(move(chunk, number, offset_bytes, None if is_all else 0))
    shapes = tuple(plan.chunk_shapes[part.leaf] for part in parts)
    # A process without a shard has an arena of one, which is not written.
    local = LayoutPlan(tuple(specs), shapes, tuple(chunks), plan.shard_bytes, max(1, len(shards)))
    return Share(local, tuple(parts), shards)


def block_of(grid: Grid, chunk_shape: Grid, block_shape: Grid) -> Grid:
    """Returns in which block a chunk lies."""
    return tuple(
        at * chunk // max(1, block)
        for at, chunk, block in zip(grid, chunk_shape, block_shape, strict=True)
    )


def _cut(grid: Grid, chunk_shape: Grid, block_shape: Grid) -> tuple[slice, ...]:
    """Where a chunk lies in its block."""
    cuts: list[slice] = []
    for at, chunk, block in zip(grid, chunk_shape, block_shape, strict=True):
        start = at * chunk % block
        cuts.append(slice(start, min(start + chunk, block)))
    return tuple(cuts)


def _limit_bytes(leaves: Sequence[LeafSpec], count: int) -> int:
    if count == 1:
        return CHUNK_LIMIT_BYTES
    equal_bytes = sum(leaf.size_bytes for leaf in leaves) // (count * _CHUNKS_PER_PROCESS)
    return min(CHUNK_LIMIT_BYTES, max(_SMALLEST_LIMIT_BYTES, equal_bytes))


def _chunk_shape(leaf: LeafSpec, block_shape: Grid, limit_bytes: int) -> Grid:
    """The largest chunk of at most so many bytes that is contiguous in a block.

    Splits the first axis whose rows fit, evenly; axes before it get chunks of one. Where the array
    has several blocks along that axis, chunks must end where blocks do; else the last one is
    padded, and even cuts keep that small.
    """
    block = LeafSpec(leaf.path, block_shape, leaf.dtype)
    if block.size_bytes <= limit_bytes:
        return tuple(max(1, size) for size in block_shape)
    row_bytes = block.size_bytes
    for axis, size in enumerate(block_shape):
        row_bytes //= size
        if row_bytes <= limit_bytes:
            pieces = -(-size // (limit_bytes // row_bytes))
            is_cut = size != leaf.shape[axis]
            rows = size // _divisor(size, pieces) if is_cut else -(-size // pieces)
            return (1,) * axis + (rows, *block_shape[axis + 1 :])
    raise AssertionError("an element is larger than a chunk")


def _divisor(size: int, pieces: int) -> int:
    """A divisor near the number of pieces: above it, unless that were many more."""
    above = next(n for n in range(pieces, size + 1) if size % n == 0)
    if above <= pieces * _MOST_PIECES:
        return above
    return next(n for n in range(pieces, 0, -1) if size % n == 0)


def _deal(
    chunks: Sequence[ChunkSpec], holders: Sequence[tuple[int, ...]], count: int
) -> tuple[list[list[int]], tuple[int, ...]]:
    """Returns the chunks of each shard, and the first shard of each process."""
    dealt = _deal_to_processes(chunks, holders, count)
    loads_bytes = [sum(room_bytes(chunks[i]) for i in members) for members in dealt]
    most_bytes = max(loads_bytes)
    # Shards are of one size, so that of the process with most decides.
    even_bytes = max(1, -(-most_bytes // max(1, -(-most_bytes // SHARD_TARGET_BYTES))))
    members: list[list[int]] = []
    first_shards = [0]
    for load_bytes, mine in zip(loads_bytes, dealt, strict=True):
        members += _deal_to_shards(chunks, mine, -(-load_bytes // even_bytes))
        first_shards.append(len(members))
    if not members:  # a state without a byte
        return [[]], (0, *[1] * count)
    return members, tuple(first_shards)


def _deal_to_processes(
    chunks: Sequence[ChunkSpec], holders: Sequence[tuple[int, ...]], count: int
) -> list[list[int]]:
    if count == 1:
        return [list(range(len(chunks)))]
    dealt: list[list[int]] = [[] for _ in range(count)]
    loads_bytes = [0] * count
    # By those who have the same blocks, whom of them has least; brought up to date when looked at.
    least: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    order = sorted(range(len(chunks)), key=lambda i: (len(holders[i]), -chunks[i].stored_bytes))
    for i in order:
        some = holders[i]
        heap = least.get(some)
        if heap is None:
            heap = least[some] = [(loads_bytes[process], process) for process in some]
            heapq.heapify(heap)
        while heap[0][0] != loads_bytes[heap[0][1]]:
            process = heap[0][1]
            heapq.heapreplace(heap, (loads_bytes[process], process))
        process = heap[0][1]
        dealt[process].append(i)
        loads_bytes[process] += room_bytes(chunks[i])
        heapq.heapreplace(heap, (loads_bytes[process], process))
    return dealt


def _deal_to_shards(
    chunks: Sequence[ChunkSpec], mine: Sequence[int], shard_count: int
) -> list[list[int]]:
    if shard_count == 1:
        return [list(mine)]
    shards: list[list[int]] = [[] for _ in range(shard_count)]
    loads = [(0, number) for number in range(shard_count)]
    for i in sorted(mine, key=lambda i: -chunks[i].stored_bytes):
        load_bytes, number = heapq.heappop(loads)
        shards[number].append(i)
        heapq.heappush(loads, (load_bytes + room_bytes(chunks[i]), number))
    return shards


def room_bytes(chunk: ChunkSpec) -> int:
    """Returns how much of a shard a chunk takes, with its checksum and what aligns the next."""
    return _round_up(chunk.stored_bytes + CHECKSUM_BYTES, ALIGNMENT_BYTES)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
