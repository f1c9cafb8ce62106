"""Where two arrays of one shape and dtype differ, piece by piece."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepsave.cli.statistics import readable
from stepsave.engine.examining import READ_THREADS
from stepsave.engine.extents import shape_chunk
from stepsave.engine.scanning import ChunkReader, batches_of
from stepsave.format.layout import Grid
from stepsave.format.records import ChunkSpec, LayoutPlan
from stepsave.snapshot.pages import Bytes
from stepsave.threads import Crew

__all__ = ("Difference", "compare", "compare_variables")

Array = np.ndarray[Any, Any]
Path = tuple[str, ...]

_PIECE_BYTES = 1 << 20
_LARGEST = np.finfo(np.float64).max


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """How two arrays differ.

    Attributes:
        differing: How many elements differ in a bit.
        same_value: How many of these have the same value all the same: zeros of either sign, and
            NaN of different bits.
        nan_in_one: How many of them are NaN in one of the two.
        largest: Largest difference where both are finite; None if there is no such element.
    """

    differing: int = 0
    same_value: int = 0
    nan_in_one: int = 0
    largest: float | None = None

    def and_of(self, other: Difference) -> Difference:
        """Returns how both together differ."""
        largest = [one.largest for one in (self, other) if one.largest is not None]
        return Difference(
            self.differing + other.differing,
            self.same_value + other.same_value,
            self.nan_in_one + other.nan_in_one,
            max(largest, default=None),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "differing": self.differing,
            "max_abs_difference": self.largest,
            "nan_in_one": self.nan_in_one,
            "same_value": self.same_value,
        }


def compare(a: Bytes, b: Bytes, dtype: str, itemsize_bytes: int) -> Difference:
    """Compares the bytes of elements of a dtype."""
    found = Difference()
    step_bytes = _PIECE_BYTES // itemsize_bytes * itemsize_bytes
    for begin in range(0, len(a), step_bytes):
        one, other = (
            side[begin : begin + step_bytes].reshape(-1, itemsize_bytes) for side in (a, b)
        )
        if not np.array_equal(one, other):  # of bytes: as fast as memory
            unlike = (one != other).any(axis=1)
            with np.errstate(all="ignore"):  # any bits may come
                values = (readable(side[unlike].reshape(-1), dtype) for side in (one, other))
                found = found.and_of(_measure(*values))
    return found


def _measure(a: Array, b: Array) -> Difference:
    """Measures elements of which each differs in a bit."""
    differing, same_value, nan_in_one = len(a), 0, 0
    if a.dtype.kind in "fc":
        is_nan = np.isnan(a), np.isnan(b)
        nan_in_one = int((is_nan[0] != is_nan[1]).sum())
        same_value = int((is_nan[0] & is_nan[1]).sum())
        is_finite = np.isfinite(a) & np.isfinite(b)
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        a, b = a[is_finite].astype(wide), b[is_finite].astype(wide)
        distances = np.minimum(np.abs(a - b), _LARGEST)
    else:
        high, low = np.maximum(a, b), np.minimum(a, b)
        # Modulo 2^64, so that it is exact for all integers.
        distances = high.astype(np.uint64) - low.astype(np.uint64)
    same_value += int((distances == 0).sum())
    largest = distances.max().item() if len(distances) else None
    return Difference(differing, same_value, nan_in_one, largest)


def compare_variables(
    a: ChunkReader, b: ChunkReader, paths: Collection[Path], crew: Crew
) -> Mapping[Path, Difference]:
    """Compares arrays of two backups, and makes sure that all of both is whole.

    Args:
        a: Reads the one.
        b: Reads the other.
        paths: Which arrays: those of the same shape and dtype in both.
        crew: Threads that help. Each has some MiB of both.

    Raises:
        CorruptBackupError: If one is damaged.
    """
    found = dict.fromkeys(paths, Difference())
    guard = threading.Lock()
    grids: dict[Path, dict[Grid, ChunkSpec]] = {leaf.path: {} for leaf in b.plan.leaves}
    for chunk in b.plan.chunks:
        grids[b.plan.leaves[chunk.leaf].path][chunk.grid] = chunk

    def compare_batch(batch: Sequence[ChunkSpec]) -> None:
        data = a.read(batch)
        pairs = [
            (one, other)
            for one in batch
            for other in _overlapping(a.plan, one, b.plan, grids[a.plan.leaves[one.leaf].path])
        ]
        # Where both are cut in the same way, as most are, these are as many as those.
        others = {other.offset_bytes: other for _, other in pairs}
        for some in batches_of(others.values()):
            data_b = b.read(some)
            for one, other in pairs:
                if other.offset_bytes not in data_b:
                    continue
                leaf = a.plan.leaves[one.leaf]
                both = _common(
                    (a.plan, one, data[one.offset_bytes]),
                    (b.plan, other, data_b[other.offset_bytes]),
                )
                part = compare(*both, leaf.dtype, leaf.itemsize_bytes)
                with guard:
                    found[leaf.path] = found[leaf.path].and_of(part)

    chosen = (chunk for chunk in a.plan.chunks if a.plan.leaves[chunk.leaf].path in found)
    crew.share(batches_of(chosen), compare_batch, helpers=READ_THREADS - 1)
    a.finish()
    b.finish()
    return found


def _overlapping(
    plan: LayoutPlan, chunk: ChunkSpec, other: LayoutPlan, grid: Mapping[Grid, ChunkSpec]
) -> Iterator[ChunkSpec]:
    """Yields the chunks of another layout that have elements of a chunk."""
    some = next(iter(grid.values()))
    sizes = other.chunk_shapes[some.leaf]
    bounds = _bounds(plan, chunk)
    ranges = [
        range(cut.start // size, -(-cut.stop // size))
        for cut, size in zip(bounds, sizes, strict=True)
    ]
    for place in itertools.product(*ranges):
        yield grid[place]


def _bounds(plan: LayoutPlan, chunk: ChunkSpec) -> list[slice]:
    """Which part of its array a chunk is."""
    sizes, shape = plan.chunk_shapes[chunk.leaf], plan.leaves[chunk.leaf].shape
    return [
        slice(at * size, min((at + 1) * size, total))
        for at, size, total in zip(chunk.grid, sizes, shape, strict=True)
    ]


def _common(
    a: tuple[LayoutPlan, ChunkSpec, Bytes], b: tuple[LayoutPlan, ChunkSpec, Bytes]
) -> tuple[Bytes, Bytes]:
    """Returns the bytes of the elements that two chunks of an array both have."""
    bounds = [_bounds(plan, chunk) for plan, chunk, _ in (a, b)]
    if bounds[0] == bounds[1]:
        return a[2], b[2]
    common = [
        (max(one.start, other.start), min(one.stop, other.stop))
        for one, other in zip(*bounds, strict=True)
    ]
    first, second = (
        shape_chunk(*side)[
            tuple(
                slice(low - cut.start, high - cut.start)
                for (low, high), cut in zip(common, own, strict=True)
            )
        ]
        for side, own in zip((a, b), bounds, strict=True)
    )
    return _bytes_of(first), _bytes_of(second)


def _bytes_of(array: Array) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
