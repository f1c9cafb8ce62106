"""Where the bytes of a state lie, as a document: `layout.json`, beside the data.

A writer compiles a plan (`stepsave.format.planning`) and stores it; a reader takes it back from
here, and trusts nothing. Nothing here touches a disk or an array.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

from stepsave.errors import CorruptBackupError, FormatVersionError, InvalidStateError
from stepsave.format.records import (
    DTYPES,
    FORMAT_VERSION,
    ChunkSpec,
    LayoutPlan,
    LeafSpec,
    read_json,
)

__all__ = (
    "CHECKSUM_BYTES",
    "PAGE_BYTES",
    "Grid",
    "check_names",
    "chunk_count",
    "chunks_of",
    "decode_layout",
    "encode_layout",
    "is_contiguous",
)

PAGE_BYTES = 4096
"""Shards are whole pages: O_DIRECT transfers whole blocks, at most a page in practice."""

CHECKSUM_BYTES = 4

_BLOCKS_VERSION = 2
"""Of a layout with chunks that are not contiguous in their leaf; other layouts are of version 1,
which every stepsave reads."""

Grid = tuple[int, ...]
"""A shape, or a place in a grid: one number per axis."""

# Limits of what a layout file may claim, so that a hostile one costs bounded work.
MAX_LEAVES = 1_000_000
MAX_CHUNKS = 10_000_000
MAX_RANK = 64
MAX_NAME_BYTES = 4096
_MAX_INT64 = 2**63 - 1


def encode_layout(plan: LayoutPlan) -> bytes:
    """Encodes a plan as `layout.json`; docs/format.md describes the fields."""
    offsets: list[list[int]] = [[] for _ in plan.leaves]
    for chunk in plan.chunks:
        offsets[chunk.leaf].append(chunk.offset_bytes)
    is_plain = all(
        is_contiguous(shape, leaf.shape)
        for leaf, shape in zip(plan.leaves, plan.chunk_shapes, strict=True)
    )
    document = {
        "format": FORMAT_VERSION if is_plain else _BLOCKS_VERSION,
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
        document = read_json(encoded)
        version = document["format"]
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptBackupError(f"{source}: expected a layout in JSON, found {e!r}.") from e
    if version not in (FORMAT_VERSION, _BLOCKS_VERSION):
        raise FormatVersionError(
            f"{source}: written in format {version!r}, but this stepsave reads format "
            f"{FORMAT_VERSION} and {_BLOCKS_VERSION}. Install a newer stepsave to restore this "
            "backup."
        )
    try:
        return _decode(document, has_blocks=version == _BLOCKS_VERSION)
    except _ImpossibleError as e:
        raise CorruptBackupError(f"{source}: {e}") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CorruptBackupError(f"{source}: malformed layout: {e!r}.") from e


class _ImpossibleError(Exception):
    """Raised for a claim in a layout that cannot be true."""


def _decode(document: dict[str, Any], *, has_blocks: bool) -> LayoutPlan:
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
        leaf, chunk_shape = _decode_leaf(entry, has_blocks=has_blocks)
        leaves.append(leaf)
        chunk_shapes.append(chunk_shape)
        offsets = cast("list[Any]", entry["offsets"])
        if len(offsets) != chunk_count(leaf, chunk_shape):
            raise _ImpossibleError(
                f"leaf {leaf.name!r}: {chunk_count(leaf, chunk_shape)} chunks expected, "
                f"{len(offsets)} offsets found."
            )
        for chunk, offset in zip(chunks_of(i, leaf, chunk_shape), offsets, strict=True):
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
        check_names(leaves)
    except InvalidStateError as e:
        raise _ImpossibleError(str(e)) from e
    _check_tree(leaves)
    if shard_count > max(1, len(chunks)):
        raise _ImpossibleError(f"{shard_count} shards for {len(chunks)} chunks.")
    _check_places(chunks, shard_bytes, shard_count)
    return LayoutPlan(tuple(leaves), tuple(chunk_shapes), tuple(chunks), shard_bytes, shard_count)


def _decode_leaf(entry: dict[str, Any], *, has_blocks: bool) -> tuple[LeafSpec, Grid]:
    path = tuple(cast("list[Any]", entry["path"]))
    if not path or not all(isinstance(key, str) for key in path):
        raise _ImpossibleError(f"path {path!r} is not a list of strings.")
    if entry["dtype"] not in DTYPES:
        raise _ImpossibleError(f"leaf {path}: unknown dtype {entry['dtype']!r}.")
    dimensions = cast("list[Any]", entry["shape"])
    shape = tuple(_integer(size, f"shape of leaf {path}") for size in dimensions)
    leaf = LeafSpec(cast("tuple[str, ...]", path), shape, entry["dtype"])
    # Nor may one without elements be so large along its other axes: NumPy has no such arrays.
    extent_bytes = math.prod(size or 1 for size in shape[: MAX_RANK + 1]) * leaf.itemsize_bytes
    if len(shape) > MAX_RANK or extent_bytes > _MAX_INT64:
        raise _ImpossibleError(f"leaf {leaf.name!r}: shape {shape} is too large.")
    sizes = cast("list[Any]", entry["chunk_shape"])
    chunk_shape = tuple(_integer(size, f"chunk of leaf {path}", low=1) for size in sizes)
    fits = _is_even if has_blocks else is_contiguous
    if len(chunk_shape) != len(shape) or not fits(chunk_shape, shape):
        raise _ImpossibleError(
            f"leaf {leaf.name!r}: chunk shape {chunk_shape} does not cut shape {shape} into "
            f"{'even blocks' if has_blocks else 'contiguous runs'}."
        )
    return leaf, chunk_shape


def _check_tree(leaves: Sequence[LeafSpec]) -> None:
    """Refuses leaves below others: a tree has none, and whoever makes one of it loses an array."""
    paths = {leaf.path for leaf in leaves}
    for path in paths:
        for length in range(1, len(path)):
            if path[:length] in paths:
                raise _ImpossibleError(f"leaf {path} is below leaf {path[:length]}.")


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


def check_names(leaves: Sequence[LeafSpec]) -> None:
    """Makes sure that each leaf can be stored under its name.

    Raises:
        InvalidStateError: If one cannot, or two would get the same.
    """
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


def is_contiguous(chunk_shape: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether chunks are runs of the bytes of an array, in C order, one after the other."""
    split = next((i for i, size in enumerate(chunk_shape) if size != 1), len(shape))
    whole = all(
        chunk == max(1, size)
        for chunk, size in zip(chunk_shape[split + 1 :], shape[split + 1 :], strict=True)
    )
    return whole and all(
        chunk <= max(1, size) for chunk, size in zip(chunk_shape, shape, strict=True)
    )


def _split_axis(chunk_shape: Sequence[int]) -> int:
    """The axis along which the rows of a chunk follow each other: alone there it may be padded."""
    last = max(0, len(chunk_shape) - 1)
    return next((axis for axis, size in enumerate(chunk_shape) if size != 1), last)


def _is_even(chunk_shape: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether chunks fit in a leaf, and end where it ends on all axes but the split one."""
    after = _split_axis(chunk_shape) + 1
    return all(
        chunk <= max(1, size) for chunk, size in zip(chunk_shape, shape, strict=True)
    ) and all(
        size % chunk == 0 for chunk, size in zip(chunk_shape[after:], shape[after:], strict=True)
    )


def chunk_count(leaf: LeafSpec, chunk_shape: Sequence[int]) -> int:
    """How many chunks of a shape a leaf has."""
    return math.prod(-(-size // chunk) for size, chunk in zip(leaf.shape, chunk_shape, strict=True))


def chunks_of(
    number: int, leaf: LeafSpec, chunk_shape: Grid, block_shape: Grid | None = None
) -> Iterator[ChunkSpec]:
    """Yields a leaf's chunks in C order of their grid, not yet placed.

    Args:
        number: Of the leaf.
        leaf: The leaf.
        chunk_shape: Shape of its chunks.
        block_shape: Shape of the blocks that it lies in; None for one. No chunk crosses their
            borders.
    """
    block_shape = leaf.shape if block_shape is None else block_shape
    stored_bytes = math.prod(chunk_shape) * leaf.itemsize_bytes
    counts = [-(-size // chunk) for size, chunk in zip(leaf.shape, chunk_shape, strict=True)]
    if 0 in counts:
        return  # before lists are made, which may be long along another axis
    stride_bytes = leaf.itemsize_bytes
    begins: list[list[int]] = []  # by axis and place in the grid: how far into the block
    for count, chunk, size in reversed([*zip(counts, chunk_shape, block_shape, strict=True)]):
        begins.insert(0, [at * chunk % size * stride_bytes for at in range(count)])
        stride_bytes *= size
    axis = _split_axis(chunk_shape)
    rows = chunk_shape[axis] if chunk_shape else 1
    size = leaf.shape[axis] if chunk_shape else 1
    grids = itertools.product(*map(range, counts))
    for grid, begin_bytes in zip(grids, itertools.product(*begins), strict=True):
        left = size - grid[axis] * rows if grid else rows
        yield ChunkSpec(
            leaf=number,
            grid=grid,
            source_bytes=sum(begin_bytes),
            data_bytes=min(rows, left) * (stored_bytes // rows),
            stored_bytes=stored_bytes,
            offset_bytes=0,
        )


def _integer(value: object, what: str, *, low: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= _MAX_INT64:
        raise _ImpossibleError(f"{what}: expected an integer of at least {low}, found {value!r}.")
    return value
