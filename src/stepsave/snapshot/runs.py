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

from stepsave.format.checksum import combine_crc32c, crc32c
from stepsave.format.layout import CHECKSUM_BYTES
from stepsave.format.records import DTYPES, ChunkSpec, LayoutPlan
from stepsave.snapshot.arrays import HostArray, as_bits, bits_of
from stepsave.snapshot.contents import Piece, digest
from stepsave.snapshot.pages import Bytes

__all__ = ("Pack", "Run", "Slab", "Source", "compile_runs", "digest_shard", "gaps")

Place = tuple[int, int, int]
"""Shard of a run, and where in it the run begins and ends."""

Source = Callable[[int], HostArray | None]
"""Gives leaf `i` of the state, waiting until it is on the host. None if the copy of it into
the arena was somebody else's work and is done."""

_SMALL_BYTES = 64 << 10
"""Chunks up to this size are packed into one run, to share what a run costs in Python."""

_PACK_BYTES = 512 << 10
"""The most that such a run copies before it is checked: it is in a core's own cache then."""

_PIECE_BYTES = 512 << 10
"""How much of a large chunk is copied before it is checked: it is in the core's cache then.
Less costs more turns at the interpreter's lock."""


class Run(Protocol):
    """Some chunks that lie side by side in a shard."""

    @property
    def shard(self) -> int:
        """Number of the shard."""
        ...

    @property
    def begin_bytes(self) -> int:
        """Where the run begins in the shard, where the one before it ends."""
        ...

    @property
    def end_bytes(self) -> int:
        """Where the run ends in the shard, with the padding behind it."""
        ...

    @property
    def piece_bytes(self) -> list[int]:
        """Sizes of the pieces in which changes are looked for."""
        ...

    def fill(self, source: Source, held: list[Piece | None], *, asks: bool) -> None:
        """Copies the chunks in, and writes the checksum of each behind it.

        Args:
            source: Gives the leaves.
            held: What the pieces are known to be, kept current.
            asks: Whether to find out what they are, and leave alone what is there already.
        """
        ...

    def stale(
        self, held: Sequence[Piece | None], written: Sequence[Piece | None]
    ) -> Iterator[tuple[int, int]]:
        """Yields what of the shard differs from what was written, or may, from and to."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Pack:
    """Small chunks: what they cost is calls, so each is one copy and one checksum."""

    shard: int
    begin_bytes: int
    end_bytes: int
    leaves: tuple[int, ...]
    targets: tuple[HostArray, ...]  # typed and shaped like the leaves
    sealed: tuple[memoryview, ...]  # what each checksum covers
    arena: Bytes
    seals: np.ndarray[Any, np.dtype[np.intp]]  # where the checksums go, shape (n, 4)
    memory: Bytes  # all of it

    @property
    def piece_bytes(self) -> list[int]:
        return [len(self.memory)]

    def fill(self, source: Source, held: list[Piece | None], *, asks: bool) -> None:
        held[0] = None
        for target, leaf in zip(self.targets, self.leaves, strict=True):
            array = source(leaf)
            if array is not None:
                target[...] = as_bits(array)
        # A loop in C: no Python runs per chunk.
        checksums = np.fromiter(map(crc32c, self.sealed), "<u4", len(self.sealed))
        self.arena[self.seals] = checksums.view(np.uint8).reshape(-1, CHECKSUM_BYTES)
        if asks:
            held[0] = digest(self.memory), 0

    def stale(
        self, held: Sequence[Piece | None], written: Sequence[Piece | None]
    ) -> Iterator[tuple[int, int]]:
        if _differs(held[0], written[0]):
            yield self.begin_bytes, self.end_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Slab:
    """One large chunk, in pieces."""

    shard: int
    begin_bytes: int
    end_bytes: int
    leaf: int
    source_bytes: int
    target: Bytes
    padding: memoryview  # zeros behind the target, in the last chunk of a leaf
    seal: Bytes  # where the checksum goes

    @property
    def piece_bytes(self) -> list[int]:
        size = len(self.target)
        return [min(_PIECE_BYTES, size - begin) for begin in range(0, size, _PIECE_BYTES)]

    def fill(self, source: Source, held: list[Piece | None], *, asks: bool) -> None:
        array = source(self.leaf)
        data = None
        if array is not None:
            data = _flat(array)[self.source_bytes : self.source_bytes + len(self.target)]
        checksum = 0
        for number, begin in enumerate(range(0, len(self.target), _PIECE_BYTES)):
            piece = self.target[begin : begin + _PIECE_BYTES]
            fresh = None if data is None else data[begin : begin + _PIECE_BYTES]
            known = held[number]
            if not (asks and known and fresh is not None and digest(fresh) == known[0]):
                held[number] = None
                if fresh is not None:
                    np.copyto(piece, fresh)
                # Of the copy, not of the source, which somebody may be changing against the rules:
                # what is saved must be readable even then, and not be taken for something else.
                known = digest(piece) if asks else b"", crc32c(piece.data)
                held[number] = known if asks else None
            checksum = combine_crc32c(checksum, known[1], len(piece))
        checksum = crc32c(self.padding, checksum)
        self.seal[:] = np.frombuffer(checksum.to_bytes(CHECKSUM_BYTES, "little"), np.uint8)

    def stale(
        self, held: Sequence[Piece | None], written: Sequence[Piece | None]
    ) -> Iterator[tuple[int, int]]:
        is_stale = False
        for number, begin in enumerate(range(self.begin_bytes, self._data_end, _PIECE_BYTES)):
            if _differs(held[number], written[number]):
                is_stale = True
                yield begin, min(begin + _PIECE_BYTES, self._data_end)
        if is_stale:
            yield self._data_end, self.end_bytes  # its checksum has changed

    @property
    def _data_end(self) -> int:
        return self.begin_bytes + len(self.target)


def compile_runs(plan: LayoutPlan, arena: Bytes) -> list[Run]:
    """Prepares all views through which states of a plan are copied into an arena."""
    runs: list[Run] = []
    for shard, chunks in enumerate(plan.shard_chunks):
        for group in _group(plan, chunks):
            start, last = shard * plan.shard_bytes, group[-1]
            begin_bytes = group[0].offset_bytes - start
            end_bytes = last.offset_bytes + last.stored_bytes + CHECKSUM_BYTES - start
            if last is chunks[-1]:
                end_bytes = plan.shard_bytes
            place = shard, begin_bytes, end_bytes
            if _is_small(plan, last):
                runs.append(_make_pack(plan, arena, place, group))
            else:
                runs.append(_make_slab(arena, place, last))
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


def _differs(held: Piece | None, written: Piece | None) -> bool:
    return held is None or held != written


def _make_pack(plan: LayoutPlan, arena: Bytes, place: Place, chunks: Sequence[ChunkSpec]) -> Pack:
    targets: list[HostArray] = []
    for chunk in chunks:
        leaf = plan.leaves[chunk.leaf]
        target = arena[chunk.offset_bytes : chunk.offset_bytes + chunk.stored_bytes]
        targets.append(target.view(bits_of(DTYPES[leaf.dtype])).reshape(leaf.shape))
    memory, last = arena.data, chunks[-1]
    end = last.offset_bytes + last.stored_bytes + CHECKSUM_BYTES
    return Pack(
        *place,
        tuple(chunk.leaf for chunk in chunks),
        tuple(targets),
        tuple(memory[chunk.offset_bytes :][: chunk.stored_bytes] for chunk in chunks),
        arena,
        _seal_places(chunks),
        arena[chunks[0].offset_bytes : end],
    )


def _make_slab(arena: Bytes, place: Place, chunk: ChunkSpec) -> Slab:
    start = chunk.offset_bytes
    end = start + chunk.stored_bytes
    return Slab(
        *place,
        chunk.leaf,
        chunk.source_bytes,
        target=arena[start : start + chunk.data_bytes],
        padding=arena.data[start + chunk.data_bytes : end],
        seal=arena[end : end + CHECKSUM_BYTES],
    )


def _seal_places(chunks: Sequence[ChunkSpec]) -> np.ndarray[Any, np.dtype[np.intp]]:
    ends = np.array([chunk.offset_bytes + chunk.stored_bytes for chunk in chunks], np.intp)
    return ends[:, None] + np.arange(CHECKSUM_BYTES)


def _flat(array: HostArray) -> Bytes:
    return np.ascontiguousarray(as_bits(array)).reshape(-1).view(np.uint8)
