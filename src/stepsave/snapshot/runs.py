"""A plan compiled into *runs*: pieces of an arena that one thread fills.

A run is a *slab*, which is one large chunk, or a *pack* of small ones. Each chunk gets its checksum
as it is copied, while it is still in the cache of the core that copied it: read again from memory
later it would cost several times as much, and take memory bandwidth from the training that goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from stepsave.format.checksum import crc32c
from stepsave.format.layout import CHECKSUM_BYTES
from stepsave.format.records import DTYPES, ChunkSpec, LayoutPlan
from stepsave.snapshot.arrays import HostArray

__all__ = ("Pack", "Run", "Slab", "Source", "compile_runs", "digest_shard", "gaps")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

Source = Callable[[int], HostArray | None]
"""Gives leaf `i` of the state, waiting until it is on the host. None if the copy of it into
the arena was somebody else's work and is done."""

_SMALL_BYTES = 64 << 10
"""Chunks up to this size are packed into one run, to share what a run costs in Python."""

_PACK_BYTES = 512 << 10
"""The most that such a run copies before it is checked: it is in a core's own cache then."""

_CACHED_BYTES = 512 << 10
"""How much of a large chunk is copied before it is checked: it is in the core's cache then.
Less costs more turns at the interpreter's lock."""

# NumPy copies these dtypes with a plain loop over bytes; others go through slower code
# that also holds the GIL, so extension types are copied as unsigned integers.
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Run(Protocol):
    """Some chunks that lie side by side in a shard."""

    @property
    def shard(self) -> int:
        """Number of the shard."""
        ...

    @property
    def end_bytes(self) -> int:
        """Where the run ends in the shard, with the padding behind it."""
        ...

    def fill(self, source: Source) -> None:
        """Copies the chunks in, and writes the checksum of each behind it."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Pack:
    """Small chunks: what they cost is calls, so each is one copy and one checksum."""

    shard: int
    end_bytes: int
    leaves: tuple[int, ...]
    targets: tuple[HostArray, ...]  # typed and shaped like the leaves
    sealed: tuple[memoryview, ...]  # what each checksum covers
    arena: Bytes
    seals: np.ndarray[Any, np.dtype[np.intp]]  # where the checksums go, shape (n, 4)

    def fill(self, source: Source) -> None:
        for target, leaf in zip(self.targets, self.leaves, strict=True):
            array = source(leaf)
            if array is not None:
                target[...] = _as_bits(array)
        # A loop in C: no Python runs per chunk.
        checksums = np.fromiter(map(crc32c, self.sealed), "<u4", len(self.sealed))
        self.arena[self.seals] = checksums.view(np.uint8).reshape(-1, CHECKSUM_BYTES)


@dataclasses.dataclass(frozen=True, slots=True)
class Slab:
    """One large chunk."""

    shard: int
    end_bytes: int
    leaf: int
    source_bytes: int
    target: Bytes
    padding: memoryview  # zeros behind the target, in the last chunk of a leaf
    seal: Bytes  # where the checksum goes

    def fill(self, source: Source) -> None:
        array = source(self.leaf)
        data = None
        if array is not None:
            data = _flat(array)[self.source_bytes : self.source_bytes + len(self.target)]
        checksum = 0
        for begin in range(0, len(self.target), _CACHED_BYTES):
            piece = self.target[begin : begin + _CACHED_BYTES]
            if data is not None:
                np.copyto(piece, data[begin : begin + _CACHED_BYTES])
            # Of the copy, not of the source, which somebody may be changing against the rules:
            # what is saved must be readable even then.
            checksum = crc32c(piece.data, checksum)
        checksum = crc32c(self.padding, checksum)
        self.seal[:] = np.frombuffer(checksum.to_bytes(CHECKSUM_BYTES, "little"), np.uint8)


def compile_runs(plan: LayoutPlan, arena: Bytes) -> list[Run]:
    """Prepares all views through which states of a plan are copied into an arena."""
    runs: list[Run] = []
    for shard, chunks in enumerate(plan.shard_chunks):
        for group in _group(plan, chunks):
            last = group[-1]
            is_last = last is chunks[-1]
            end = last.offset_bytes + last.stored_bytes + CHECKSUM_BYTES
            end_bytes = plan.shard_bytes if is_last else end - shard * plan.shard_bytes
            if _is_small(plan, last):
                runs.append(_make_pack(plan, arena, shard, end_bytes, group))
            else:
                runs.append(_make_slab(arena, shard, end_bytes, last))
    return runs


def gaps(plan: LayoutPlan, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields what of so much memory no run of a plan writes, from and to: it must be zeros."""
    end = 0
    for chunk in sorted(plan.chunks, key=lambda chunk: chunk.offset_bytes):
        if chunk.offset_bytes > end:
            yield end, chunk.offset_bytes
        end = chunk.offset_bytes + chunk.stored_bytes
        if chunk.data_bytes < chunk.stored_bytes:
            yield chunk.offset_bytes + chunk.data_bytes, end
        end += CHECKSUM_BYTES
    yield end, size_bytes


def digest_shard(plan: LayoutPlan, arena: Bytes, number: int) -> int:
    """Returns the CRC-32C over the checksums of a shard's chunks, in order."""
    chunks = plan.shard_chunks[number]
    seals = _seal_places(chunks)
    return crc32c(arena[seals].tobytes())


def _group(plan: LayoutPlan, chunks: Sequence[ChunkSpec]) -> Iterator[list[ChunkSpec]]:
    """Groups a shard's chunks: large ones by themselves, small neighbours together."""
    group: list[ChunkSpec] = []
    size_bytes = 0
    for chunk in chunks:
        is_small = _is_small(plan, chunk)
        if group and (not is_small or size_bytes + chunk.stored_bytes > _PACK_BYTES):
            yield group
            group, size_bytes = [], 0
        if is_small:
            group.append(chunk)
            size_bytes += chunk.stored_bytes
        else:
            yield [chunk]
    if group:
        yield group


def _is_small(plan: LayoutPlan, chunk: ChunkSpec) -> bool:
    is_whole = chunk.data_bytes == plan.leaves[chunk.leaf].size_bytes == chunk.stored_bytes
    return is_whole and chunk.stored_bytes <= _SMALL_BYTES


def _make_pack(
    plan: LayoutPlan, arena: Bytes, shard: int, end_bytes: int, chunks: Sequence[ChunkSpec]
) -> Pack:
    targets: list[HostArray] = []
    for chunk in chunks:
        leaf = plan.leaves[chunk.leaf]
        target = arena[chunk.offset_bytes : chunk.offset_bytes + chunk.stored_bytes]
        targets.append(target.view(_bits_of(DTYPES[leaf.dtype])).reshape(leaf.shape))
    memory = arena.data
    return Pack(
        shard,
        end_bytes,
        tuple(chunk.leaf for chunk in chunks),
        tuple(targets),
        tuple(memory[chunk.offset_bytes :][: chunk.stored_bytes] for chunk in chunks),
        arena,
        _seal_places(chunks),
    )


def _make_slab(arena: Bytes, shard: int, end_bytes: int, chunk: ChunkSpec) -> Slab:
    start = chunk.offset_bytes
    end = start + chunk.stored_bytes
    return Slab(
        shard,
        end_bytes,
        chunk.leaf,
        chunk.source_bytes,
        target=arena[start : start + chunk.data_bytes],
        padding=arena.data[start + chunk.data_bytes : end],
        seal=arena[end : end + CHECKSUM_BYTES],
    )


def _seal_places(chunks: Sequence[ChunkSpec]) -> np.ndarray[Any, np.dtype[np.intp]]:
    ends = np.array([chunk.offset_bytes + chunk.stored_bytes for chunk in chunks], np.intp)
    return ends[:, None] + np.arange(CHECKSUM_BYTES)


def _bits_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    is_native = dtype.isbuiltin == 1
    return dtype if is_native else np.dtype(_BITS[dtype.itemsize])


def _as_bits(array: HostArray) -> HostArray:
    return array if array.dtype.isbuiltin == 1 else array.view(_bits_of(array.dtype))


def _flat(array: HostArray) -> Bytes:
    return np.ascontiguousarray(_as_bits(array)).reshape(-1).view(np.uint8)
