"""Compiles the shapes of a state into a plan: where each byte lies, once per structure.

The plan cuts large leaves into chunks and deals all chunks out over equal shards. It is
stored beside the data as `layout.json`, from which the reader takes it back. Nothing here
touches a disk or an array.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

from stepsave.errors import CorruptBackupError, FormatVersionError, InvalidStateError
from stepsave.format.records import DTYPES, FORMAT_VERSION, ChunkSpec, LayoutPlan, LeafSpec

__all__ = ("PAGE_BYTES", "compile_layout", "decode_layout", "encode_layout")

PAGE_BYTES = 4096
"""Shards are whole pages: O_DIRECT transfers whole blocks, at most a page in practice."""

SHARD_TARGET_BYTES = 64 << 20
"""Large enough to amortise a file, small enough that two writers share one save."""

CHUNK_LIMIT_BYTES = SHARD_TARGET_BYTES // 4
"""No chunk is larger, so dealing them out leaves shards within a quarter of each other."""

ALIGNMENT_BYTES = 64
"""A cache line: keeps vectorised copies aligned whatever the dtype."""

CHECKSUM_BYTES = 4

# Limits of what a layout file may claim, so that a hostile one costs bounded work.
MAX_LEAVES = 1_000_000
MAX_CHUNKS = 10_000_000
MAX_RANK = 64
MAX_NAME_BYTES = 4096
_MAX_INT64 = 2**63 - 1


def compile_layout(leaves: Sequence[LeafSpec]) -> LayoutPlan:
    """Decides where every leaf lies in the arena and how the arena is cut into shards.

    Chunks are dealt largest first, each to the emptiest shard (the LPT rule of Graham,
    1969), so shards come out balanced and the padding that equal shards cost is small.

    Args:
        leaves: The arrays of the state. The same leaves give the same plan.

    Raises:
        InvalidStateError: If two leaves would get the same name, or a leaf is beyond what
            the format can hold.
    """
    _check_names(leaves)
    chunk_shapes = tuple(_chunk_shape(leaf) for leaf in leaves)
    loose = [
        chunk
        for i, (leaf, shape) in enumerate(zip(leaves, chunk_shapes, strict=True))
        for chunk in _chunks_of(i, leaf, shape)
    ]
    total_bytes = sum(_room_bytes(chunk) for chunk in loose)
    shard_count = max(1, -(-total_bytes // SHARD_TARGET_BYTES))
    members = _deal(loose, shard_count)
    shard_bytes = max(
        (_round_up(sum(_room_bytes(loose[i]) for i in shard), PAGE_BYTES) for shard in members),
        default=0,
    )
    shard_bytes = max(shard_bytes, PAGE_BYTES)

    placed: dict[int, ChunkSpec] = {}
    for number, shard in enumerate(members):
        offset_bytes = number * shard_bytes
        for i in sorted(shard):  # in the order of the state: capture walks memory forward
            chunk = loose[i]
            placed[i] = ChunkSpec(
                chunk.leaf,
                chunk.grid,
                chunk.source_bytes,
                chunk.data_bytes,
                chunk.stored_bytes,
                offset_bytes,
            )
            offset_bytes += _room_bytes(chunk)
    chunks = tuple(placed[i] for i in range(len(loose)))
    return LayoutPlan(tuple(leaves), chunk_shapes, chunks, shard_bytes, shard_count)


def encode_layout(plan: LayoutPlan) -> bytes:
    """Encodes a plan as `layout.json`; docs/format.md describes the fields."""
    offsets: list[list[int]] = [[] for _ in plan.leaves]
    for chunk in plan.chunks:
        offsets[chunk.leaf].append(chunk.offset_bytes)
    document = {
        "format": FORMAT_VERSION,
        "shard_bytes": plan.shard_bytes,
        "shard_count": plan.shard_count,
        "leaves": [
            {
                "path": list(leaf.path),
                "shape": list(leaf.shape),
                "dtype": leaf.dtype,
                "chunk_shape": list(chunk_shape),
                "offsets": offsets[i],
            }
            for i, (leaf, chunk_shape) in enumerate(
                zip(plan.leaves, plan.chunk_shapes, strict=True)
            )
        ],
    }
    return json.dumps(document, separators=(",", ":")).encode()


def decode_layout(encoded: bytes, source: str) -> LayoutPlan:
    """Decodes and checks `layout.json`; trusts nothing that it says.

    Args:
        encoded: The file's bytes.
        source: The file's path, for error texts.

    Raises:
        FormatVersionError: If a newer stepsave wrote it.
        CorruptBackupError: If anything in it is impossible.
    """
    try:
        document = json.loads(encoded)
        version = document["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise CorruptBackupError(f"{source}: expected a layout in JSON, found {e!r}.") from e
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{source}: written in format {version!r}, but this stepsave reads format "
            f"{FORMAT_VERSION}. Install a newer stepsave to restore this backup."
        )
    try:
        return _decode(document)
    except _ImpossibleError as e:
        raise CorruptBackupError(f"{source}: {e}") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CorruptBackupError(f"{source}: malformed layout: {e!r}.") from e


class _ImpossibleError(Exception):
    """Raised for a claim in a layout that cannot be true."""


def _decode(document: dict[str, Any]) -> LayoutPlan:
    shard_bytes = _integer(document["shard_bytes"], "shard_bytes", low=PAGE_BYTES)
    shard_count = _integer(document["shard_count"], "shard_count", low=1)
    if shard_bytes % PAGE_BYTES:
        raise _ImpossibleError(f"shard_bytes {shard_bytes} is not a multiple of {PAGE_BYTES}.")

    entries = cast("list[dict[str, Any]]", document["leaves"])
    if len(entries) > MAX_LEAVES:
        raise _ImpossibleError(f"{len(entries)} leaves; at most {MAX_LEAVES} are allowed.")

    leaves: list[LeafSpec] = []
    chunk_shapes: list[tuple[int, ...]] = []
    chunks: list[ChunkSpec] = []
    for i, entry in enumerate(entries):
        leaf, chunk_shape = _decode_leaf(entry)
        leaves.append(leaf)
        chunk_shapes.append(chunk_shape)
        offsets = cast("list[Any]", entry["offsets"])
        if len(offsets) != _chunk_count(leaf, chunk_shape):
            raise _ImpossibleError(
                f"leaf {leaf.name!r}: {_chunk_count(leaf, chunk_shape)} chunks expected, "
                f"{len(offsets)} offsets found."
            )
        for chunk, offset in zip(_chunks_of(i, leaf, chunk_shape), offsets, strict=True):
            at = _integer(offset, f"offset of leaf {leaf.name!r}")
            chunks.append(
                ChunkSpec(
                    i,
                    chunk.grid,
                    chunk.source_bytes,
                    chunk.data_bytes,
                    chunk.stored_bytes,
                    at,
                )
            )
        if len(chunks) > MAX_CHUNKS:
            raise _ImpossibleError(f"more than {MAX_CHUNKS} chunks.")
    try:
        _check_names(leaves)
    except InvalidStateError as e:
        raise _ImpossibleError(str(e)) from e
    if shard_count > max(1, len(chunks)):
        raise _ImpossibleError(f"{shard_count} shards for {len(chunks)} chunks.")
    _check_places(chunks, shard_bytes, shard_count)
    return LayoutPlan(tuple(leaves), tuple(chunk_shapes), tuple(chunks), shard_bytes, shard_count)


def _decode_leaf(entry: dict[str, Any]) -> tuple[LeafSpec, tuple[int, ...]]:
    path = tuple(cast("list[Any]", entry["path"]))
    if not path or not all(isinstance(key, str) for key in path):
        raise _ImpossibleError(f"path {path!r} is not a list of strings.")
    if entry["dtype"] not in DTYPES:
        raise _ImpossibleError(f"leaf {path}: unknown dtype {entry['dtype']!r}.")
    dimensions = cast("list[Any]", entry["shape"])
    shape = tuple(_integer(size, f"shape of leaf {path}") for size in dimensions)
    leaf = LeafSpec(cast("tuple[str, ...]", path), shape, entry["dtype"])
    if len(shape) > MAX_RANK or leaf.size_bytes > _MAX_INT64:
        raise _ImpossibleError(f"leaf {leaf.name!r}: shape {shape} is too large.")
    sizes = cast("list[Any]", entry["chunk_shape"])
    chunk_shape = tuple(_integer(size, f"chunk of leaf {path}", low=1) for size in sizes)
    if len(chunk_shape) != len(shape) or not _is_contiguous(chunk_shape, shape):
        raise _ImpossibleError(
            f"leaf {leaf.name!r}: chunk shape {chunk_shape} does not cut shape {shape} into "
            "contiguous runs."
        )
    return leaf, chunk_shape


def _check_places(chunks: Sequence[ChunkSpec], shard_bytes: int, shard_count: int) -> None:
    """Refuses chunks that overlap, cross a shard or lie outside the arena."""
    end_bytes = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset_bytes):
        last = chunk.offset_bytes + chunk.stored_bytes + CHECKSUM_BYTES - 1
        if chunk.offset_bytes < end_bytes:
            raise _ImpossibleError(f"two chunks overlap at byte {chunk.offset_bytes}.")
        if chunk.offset_bytes // shard_bytes != last // shard_bytes:
            raise _ImpossibleError(f"the chunk at byte {chunk.offset_bytes} crosses a shard.")
        end_bytes = last + 1
    if end_bytes > shard_bytes * shard_count:
        raise _ImpossibleError(
            f"chunks end at byte {end_bytes}, beyond {shard_count} shards of {shard_bytes} bytes."
        )


def _check_names(leaves: Sequence[LeafSpec]) -> None:
    seen: dict[str, LeafSpec] = {}
    for leaf in leaves:
        name = leaf.name
        other = seen.setdefault(name, leaf)
        if other is not leaf:
            raise InvalidStateError(
                f"Leaves {other.path} and {leaf.path} would both be stored as {name!r}: "
                "Orbax joins keys with '.'. Rename one of them."
            )
        if not all(leaf.path) or name.endswith("/"):
            raise InvalidStateError(
                f"Leaf {leaf.path}: expected keys that are not empty and a name that does not "
                "end in '/'. Rename it."
            )
        try:
            name_bytes = len(name.encode())
        except UnicodeEncodeError as e:
            raise InvalidStateError(
                f"Leaf {leaf.path}: its name is not valid Unicode: {e.reason}. Rename it."
            ) from e
        if name_bytes > MAX_NAME_BYTES:
            raise InvalidStateError(
                f"Leaf {name[:80]!r}…: expected a name of at most {MAX_NAME_BYTES} bytes in "
                f"UTF-8, found {name_bytes}. Use shorter keys."
            )


def _chunk_shape(leaf: LeafSpec) -> tuple[int, ...]:
    """The largest chunk of at most `CHUNK_LIMIT_BYTES` that is contiguous in the leaf.

    Splits the first axis whose rows fit, evenly, so that the last chunk pads little; axes
    before it get chunks of one.
    """
    if leaf.size_bytes <= CHUNK_LIMIT_BYTES:
        return tuple(max(1, size) for size in leaf.shape)
    row_bytes = leaf.size_bytes
    for axis, size in enumerate(leaf.shape):
        row_bytes //= size
        if row_bytes <= CHUNK_LIMIT_BYTES:
            most_rows = CHUNK_LIMIT_BYTES // row_bytes
            pieces = -(-size // most_rows)
            rows = -(-size // pieces)
            return (1,) * axis + (rows, *leaf.shape[axis + 1 :])
    raise AssertionError("an element is larger than a chunk")


def _is_contiguous(chunk_shape: Sequence[int], shape: Sequence[int]) -> bool:
    split = next((i for i, size in enumerate(chunk_shape) if size != 1), len(shape))
    whole = all(
        chunk == max(1, size)
        for chunk, size in zip(chunk_shape[split + 1 :], shape[split + 1 :], strict=True)
    )
    return whole and all(
        chunk <= max(1, size) for chunk, size in zip(chunk_shape, shape, strict=True)
    )


def _split_axis(chunk_shape: Sequence[int], shape: Sequence[int]) -> int:
    """The axis along which consecutive chunks follow each other in memory."""
    for axis in range(len(shape) - 1, -1, -1):
        if chunk_shape[axis] < shape[axis]:
            return axis
    return 0


def _chunk_count(leaf: LeafSpec, chunk_shape: Sequence[int]) -> int:
    return math.prod(-(-size // chunk) for size, chunk in zip(leaf.shape, chunk_shape, strict=True))


def _chunks_of(number: int, leaf: LeafSpec, chunk_shape: tuple[int, ...]) -> Iterator[ChunkSpec]:
    """Yields a leaf's chunks in C order of their grid, not yet placed."""
    stored_bytes = math.prod(chunk_shape) * leaf.itemsize_bytes
    if _chunk_count(leaf, chunk_shape) == 0:
        return
    if not leaf.shape:
        yield ChunkSpec(number, (), 0, stored_bytes, stored_bytes, 0)
        return
    axis = _split_axis(chunk_shape, leaf.shape)
    size, rows = leaf.shape[axis], chunk_shape[axis]
    row_bytes = stored_bytes // rows
    after = (0,) * (len(leaf.shape) - axis - 1)
    outer = itertools.product(*map(range, leaf.shape[:axis]))
    for block, before in enumerate(outer):
        for piece, row in enumerate(range(0, size, rows)):
            yield ChunkSpec(
                leaf=number,
                grid=(*before, piece, *after),
                source_bytes=(block * size + row) * row_bytes,
                data_bytes=min(rows, size - row) * row_bytes,
                stored_bytes=stored_bytes,
                offset_bytes=0,
            )


def _deal(chunks: Sequence[ChunkSpec], shard_count: int) -> list[list[int]]:
    shards: list[list[int]] = [[] for _ in range(shard_count)]
    if shard_count == 1:
        shards[0] = list(range(len(chunks)))
        return shards
    loads = [(0, number) for number in range(shard_count)]
    for i in sorted(range(len(chunks)), key=lambda i: -chunks[i].stored_bytes):
        load_bytes, number = heapq.heappop(loads)
        shards[number].append(i)
        heapq.heappush(loads, (load_bytes + _room_bytes(chunks[i]), number))
    return shards


def _room_bytes(chunk: ChunkSpec) -> int:
    return _round_up(chunk.stored_bytes + CHECKSUM_BYTES, ALIGNMENT_BYTES)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _integer(value: object, what: str, *, low: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= _MAX_INT64:
        raise _ImpossibleError(f"{what}: expected an integer of at least {low}, found {value!r}.")
    return value
