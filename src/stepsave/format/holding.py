"""What one of several processes has of a state, as a backup of its own.

On a disk that other machines do not see, a process keeps every block that its devices have, so that
it needs nobody to go on. In front lie the shards that it would write of a backup of all, byte for
byte: to upload these together is to copy them. Which they are, `holding.json` says.

The leaves of such a backup are blocks. Their paths end in their place, `0.1 of 2.4`, or in `whole`.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import re
from collections.abc import Sequence

from stepsave.errors import CorruptBackupError, FormatVersionError
from stepsave.format.layout import Grid, chunks_of, decode_layout, encode_layout
from stepsave.format.planning import (
    Deal,
    Part,
    Share,
    block_of,
    move,
    room_bytes,
)
from stepsave.format.records import ChunkSpec, LayoutPlan, LeafSpec, read_json

__all__ = (
    "HOLDING_PATH",
    "Holding",
    "decode_holding",
    "encode_holding",
    "first_chunk",
    "hold",
    "place_of",
)

HOLDING_PATH = "holding.json"
_FORMAT = 1
_WHOLE = "whole"
_PLACE = re.compile(r"(\d+(?:\.\d+)*) of (\d+(?:\.\d+)*)")


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """Which part of a state of several processes a backup has.

    Attributes:
        process: Whose it is.
        processes: How many there are.
        first_shard: Number, in a backup of all, of the first shard here.
        shard_count: How many of the shards here are those of a backup of all.
        device: As in `orbax.constant_files`, for a backup of all.
        plan: The layout of a backup of all.
    """

    process: int
    processes: int
    first_shard: int
    shard_count: int
    device: str | None
    plan: LayoutPlan


def encode_holding(holding: Holding) -> bytes:
    """Encodes `holding.json`; docs/format.md describes the fields."""
    fields = {
        field.name: getattr(holding, field.name)
        for field in dataclasses.fields(holding)
        if field.name != "plan"
    }
    document = {"format": _FORMAT, **fields, "layout": json.loads(encode_layout(holding.plan))}
    return json.dumps(document, separators=(",", ":")).encode()


def decode_holding(encoded: bytes, source: str) -> Holding:
    """Decodes and checks `holding.json`; trusts nothing that it says.

    Raises:
        FormatVersionError, CorruptBackupError: As `decode_layout`.
    """
    try:
        document = read_json(encoded)
        version = document["format"]
        if type(version) is int and version > _FORMAT:
            raise FormatVersionError(
                f"{source}: written in format {version}, but this stepsave reads format {_FORMAT}. "
                "Install a newer stepsave to restore this backup."
            )
        plan = decode_layout(json.dumps(document["layout"]).encode(), source)
        numbers = [document[name] for name in ("process", "processes", "first_shard")]
        process, processes, first = numbers
        count, device = document["shard_count"], document["device"]
        is_possible = (
            version == _FORMAT
            and all(type(number) is int for number in (*numbers, count))
            and 0 <= process < processes
            and 0 <= first <= first + count <= plan.shard_count
            and count >= 0
            and isinstance(device, str | None)
        )
    except CorruptBackupError:
        raise
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptBackupError(f"{source}: malformed: {e!r}.") from e
    if not is_possible:
        raise CorruptBackupError(f"{source}: describes a part that cannot be.")
    return Holding(process, processes, first, count, device, plan)


def hold(deal: Deal, process: int) -> tuple[LayoutPlan, Share]:
    """Returns the layout of all that a process has, and what it captures for that.

    What lies with process 0 alone, as far as the deal knows, each has: arrays that are not spread.
    """
    plan, mine = deal.plan, range(*deal.first_shards[process : process + 2])
    own = {c.offset_bytes for number in mine for c in plan.shard_chunks[number]}
    start_bytes = mine.start * plan.shard_bytes
    placed: list[tuple[ChunkSpec, Grid, int]] = []
    more: list[tuple[ChunkSpec, Grid]] = []
    for chunk in plan.chunks:
        spread = deal.spreads[chunk.leaf]
        block = block_of(chunk.grid, plan.chunk_shapes[chunk.leaf], spread.block_shape)
        if chunk.offset_bytes in own:
            placed.append((chunk, block, chunk.offset_bytes - start_bytes))
        elif (
            process in spread.holders[block] or spread.block_shape == plan.leaves[chunk.leaf].shape
        ):
            more.append((chunk, block))
    bins = _pack([chunk for chunk, _ in more], plan.shard_bytes)
    for number, members in enumerate(bins, len(mine)):
        offset_bytes = number * plan.shard_bytes
        for i in members:
            placed.append((*more[i], offset_bytes))
            offset_bytes += room_bytes(more[i][0])
    return _of_blocks(deal, placed, len(mine) + len(bins))


def _pack(chunks: Sequence[ChunkSpec], limit_bytes: int) -> list[list[int]]:
    """Puts chunks into as few shards as is easy: the largest first, each where most is free."""
    free: list[tuple[int, int]] = []
    bins: list[list[int]] = []
    for i in sorted(range(len(chunks)), key=lambda i: -chunks[i].stored_bytes):
        size_bytes = room_bytes(chunks[i])
        if not free or -free[0][0] < size_bytes:
            heapq.heappush(free, (-limit_bytes, len(bins)))
            bins.append([])
        left_bytes, number = heapq.heappop(free)
        bins[number].append(i)
        heapq.heappush(free, (left_bytes + size_bytes, number))
    return [sorted(members) for members in bins]


def _of_blocks(
    deal: Deal, placed: Sequence[tuple[ChunkSpec, Grid, int]], shard_count: int
) -> tuple[LayoutPlan, Share]:
    plan = deal.plan
    numbers: dict[tuple[int, Grid], int] = {}
    offsets: list[dict[Grid, int]] = []
    for chunk, block, offset_bytes in placed:
        number = numbers.setdefault((chunk.leaf, block), len(numbers))
        if number == len(offsets):
            offsets.append({})
        offsets[number][_within(deal, chunk, block)] = offset_bytes
    parts = tuple(Part(leaf, block, None) for leaf, block in numbers)
    specs, shapes, chunks = [], [], []
    for number, part in enumerate(parts):
        shape = plan.chunk_shapes[part.leaf]
        spec = _name(plan.leaves[part.leaf], deal.spreads[part.leaf].block_shape, part.block)
        specs.append(spec)
        shapes.append(shape)
        loose = chunks_of(number, spec, shape)
        chunks += [move(chunk, number, offsets[number][chunk.grid]) for chunk in loose]
    count = max(1, shard_count)
    captured = LayoutPlan(tuple(specs), tuple(shapes), tuple(chunks), plan.shard_bytes, count)
    for leaf, shape in zip(plan.leaves, plan.chunk_shapes, strict=True):
        if 0 in leaf.shape:  # nothing to capture, but it is of the state
            specs.append(LeafSpec((*leaf.path, _WHOLE), leaf.shape, leaf.dtype))
            shapes.append(shape)
    whole = LayoutPlan(tuple(specs), tuple(shapes), captured.chunks, plan.shard_bytes, count)
    return whole, Share(captured, parts, range(count))


def _within(deal: Deal, chunk: ChunkSpec, block: Grid) -> Grid:
    """The place of a chunk in the grid of its block."""
    shapes = deal.plan.chunk_shapes[chunk.leaf], deal.spreads[chunk.leaf].block_shape
    return tuple(
        at - first for at, first in zip(chunk.grid, first_chunk(block, *shapes), strict=True)
    )


def first_chunk(block: Grid, chunk_shape: Grid, block_shape: Grid) -> Grid:
    """The place, in the grid of the array, of the first chunk of a block.

    Chunks end where blocks do, along every axis of which there are several.
    """
    return tuple(
        at * (size // max(1, chunk))
        for at, chunk, size in zip(block, chunk_shape, block_shape, strict=True)
    )


def _name(leaf: LeafSpec, block_shape: Grid, block: Grid) -> LeafSpec:
    counts = [total // max(1, size) for total, size in zip(leaf.shape, block_shape, strict=True)]
    place = f"{'.'.join(map(str, block))} of {'.'.join(map(str, counts))}"
    name = _WHOLE if block_shape == leaf.shape else place
    return LeafSpec((*leaf.path, name), block_shape, leaf.dtype)


def place_of(name: str, rank: int) -> tuple[Grid, Grid]:
    """Returns which block a leaf is, by the last part of its path, and how many there are.

    Raises:
        ValueError: If it does not say so, for an array of that many axes.
    """
    if name == _WHOLE:
        return (0,) * rank, (1,) * rank
    match = _PLACE.fullmatch(name)
    if match is not None:
        place, counts = (tuple(map(int, text.split("."))) for text in match.groups())
        if len(place) == len(counts) == rank and all(map(int.__lt__, place, counts)):
            return place, counts
    raise ValueError(f"{name!r} is no place of a block of {rank} axes")
