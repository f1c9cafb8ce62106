"""How a state gets into an arena: who copies what, and how far all of it has come.

A plan is compiled into *runs*, each a piece of the arena that one thread fills: a *slab*, which
is one large chunk, or a *pack* of small ones. How far they have come is known per shard, so
that the first bytes can be written while the last are still on their way from a device.

Each chunk gets its checksum as it is copied, while it is still in the cache of the core that
copied it: read again from memory later it would cost several times as much, and take memory
bandwidth from the training that goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from stepsave.format.checksum import crc32c
from stepsave.format.layout import CHECKSUM_BYTES
from stepsave.format.records import DTYPES, ChunkSpec, LayoutPlan
from stepsave.snapshot.arrays import HostArray

__all__ = ("Filling", "Run", "compile_runs", "digest_shard")

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

PIECE_BYTES = 8 << 20
"""How much is written at least, while the rest is still on its way: enough for the disk."""

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
class _Pack:
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
class _Slab:
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


def digest_shard(plan: LayoutPlan, arena: Bytes, number: int) -> int:
    """Returns the CRC-32C over the checksums of a shard's chunks, in order."""
    chunks = plan.shard_chunks[number]
    seals = _seal_places(chunks)
    return crc32c(arena[seals].tobytes())


class Filling:
    """One state on its way into an arena, shared by those who copy and those who write."""

    def __init__(self, runs: Sequence[Run], plan: LayoutPlan, source: Source) -> None:
        self._runs = runs
        self._source: Source | None = source
        self._shard_bytes = plan.shard_bytes
        self._changed = threading.Condition()
        # Shared by those who fill. Taking the next is one call into C: none is taken twice.
        self._packs = iter([i for i, run in enumerate(runs) if isinstance(run, _Pack)])
        self._slabs = iter([i for i, run in enumerate(runs) if isinstance(run, _Slab)])
        self._is_done = bytearray(len(runs))
        self._first_open = 0  # all runs before it are done
        self._final_bytes = [0] * plan.shard_count
        self._told_bytes = [0] * plan.shard_count
        self._error: BaseException | None = None
        self._workers = 0
        for shard, chunks in enumerate(plan.shard_chunks):
            if not chunks:
                self._final_bytes[shard] = plan.shard_bytes

    def work(self) -> None:
        """Fills runs until none is left.

        Raises:
            BaseException: What went wrong in this thread; all others then stop too.
        """
        self._fill(itertools.chain(self._packs, self._slabs))

    def help(self) -> None:
        """Fills runs while another thread is at `work`; any number of threads may do so.

        Only large chunks: copying small ones is mostly Python, and two threads that take
        turns at the interpreter's lock for each of them are slower than one.

        Raises:
            BaseException: As `work`.
        """
        self._fill(self._slabs)

    def _fill(self, numbers: Iterator[int]) -> None:
        with self._changed:
            source = self._source
            if source is None:
                return  # the others were faster, or the state was given up
            self._workers += 1
        try:
            for number in numbers:
                self._runs[number].fill(source)
                self._advance(number)
                if self._error is not None:
                    break
        except BaseException as e:
            self.fail(e)
            raise
        finally:
            with self._changed:
                self._workers -= 1
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Gives the state up: nobody will fill what is not filled yet."""
        with self._changed:
            self._error = self._error or error
            self._source = None
            self._changed.notify_all()

    def wait(self) -> None:
        """Returns when the whole state is in the arena.

        Raises:
            BaseException: What `fail` was told, or what went wrong in `work`.
        """
        with self._changed:
            while self._first_open < len(self._runs):
                self._check()
                self._changed.wait()

    def wait_ended(self) -> None:
        """Returns when no thread copies any more: all is in the arena, or given up."""
        with self._changed:
            while self._workers or (self._first_open < len(self._runs) and self._error is None):
                self._changed.wait()

    def final(self, shard: int) -> Iterator[int]:
        """Yields how many bytes of a shard are final, each time more, in the end all.

        Raises:
            BaseException: As `wait`.
        """
        seen_bytes = 0
        while seen_bytes < self._shard_bytes:
            with self._changed:
                while self._final_bytes[shard] == seen_bytes:
                    self._check()
                    self._changed.wait()
                seen_bytes = self._final_bytes[shard]
            yield seen_bytes

    def ranges(self, shard: int) -> Iterator[tuple[int, int]]:
        """Yields what of a shard is to be written next, from and to; in the end all of it.

        Raises:
            BaseException: As `wait`.
        """
        begin_bytes = 0
        for end_bytes in self.final(shard):
            yield begin_bytes, end_bytes
            begin_bytes = end_bytes

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _advance(self, number: int) -> None:
        with self._changed:
            self._is_done[number] = True
            begin = self._first_open
            end = self._is_done.find(0, begin)
            self._first_open = end = len(self._runs) if end < 0 else end
            is_news = end == len(self._runs)
            if is_news:
                # While views of a JAX array live, donating it is a copy.
                self._source = None
            for run in self._runs[begin:end]:
                shard, final_bytes = run.shard, run.end_bytes
                is_whole = final_bytes == self._shard_bytes
                if is_whole or final_bytes - self._told_bytes[shard] >= PIECE_BYTES:
                    self._told_bytes[shard] = self._final_bytes[shard] = final_bytes
                    is_news = True
            if is_news:
                self._changed.notify_all()


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
) -> _Pack:
    targets: list[HostArray] = []
    for chunk in chunks:
        leaf = plan.leaves[chunk.leaf]
        target = arena[chunk.offset_bytes : chunk.offset_bytes + chunk.stored_bytes]
        targets.append(target.view(_bits_of(DTYPES[leaf.dtype])).reshape(leaf.shape))
    memory = arena.data
    return _Pack(
        shard,
        end_bytes,
        tuple(chunk.leaf for chunk in chunks),
        tuple(targets),
        tuple(memory[chunk.offset_bytes :][: chunk.stored_bytes] for chunk in chunks),
        arena,
        _seal_places(chunks),
    )


def _make_slab(arena: Bytes, shard: int, end_bytes: int, chunk: ChunkSpec) -> _Slab:
    start = chunk.offset_bytes
    end = start + chunk.stored_bytes
    return _Slab(
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
