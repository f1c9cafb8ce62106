"""Reads all of a backup in bounded memory, shard by shard or chunk by chunk, and checks it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence

from stepsave.engine.examining import READ_THREADS, Damage, leaves_of, noting
from stepsave.errors import CorruptBackupError
from stepsave.format import orbax
from stepsave.format.checksum import crc32c
from stepsave.format.layout import CHECKSUM_BYTES, PAGE_BYTES
from stepsave.format.records import BackupRecord, ChunkSpec, LayoutPlan
from stepsave.snapshot.pages import Bytes, allocate_pages
from stepsave.store.bucket import BucketStore
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = ("ChunkReader", "Visit", "batches_of", "scan_shards")

Visit = Callable[[ChunkSpec, Bytes], object]
"""Called, by several threads, with a chunk that has proved itself and its data without padding,
which it must not keep."""

_BATCH_BYTES = 16 << 20


def scan_shards(
    store: Store,
    record: BackupRecord,
    plan: LayoutPlan,
    crew: Crew,
    visit: Visit | None = None,
    on_read: Callable[[int], object] | None = None,
) -> list[Damage]:
    """Reads every byte of the shards of a backup; returns all that is damaged, not the first only.

    Args:
        store: Where it is.
        record: What its marker says.
        plan: Its layout.
        crew: Threads that read too; each has the memory of one shard.
        visit: Called with each chunk that is whole.
        on_read: Told the size of each piece that was read.

    Raises:
        BucketError, PermissionError: If one cannot be read, though it may be whole.
    """
    buffers: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
    damages: list[tuple[int, list[Damage]]] = []

    def scan(number: int) -> None:
        try:
            buffer = buffers.get_nowait()
        except queue.Empty:
            buffer = allocate_pages(plan.shard_bytes)
        shard = _Shard(store, record, plan, number, buffer)
        shard.read(on_read)
        shard.check(visit)
        damages.append((number, shard.damages))
        buffers.put(buffer)

    crew.share(range(plan.shard_count), scan, helpers=READ_THREADS - 1)
    return [damage for _, some in sorted(damages, key=lambda one: one[0]) for damage in some]


class _Shard:
    """One shard, in memory for it."""

    def __init__(
        self, store: Store, record: BackupRecord, plan: LayoutPlan, number: int, buffer: Bytes
    ) -> None:
        self._store = store
        self._path = f"{record.directory}/{orbax.shard_path(number)}"
        self._plan = plan
        self._digest = record.shard_digests[number]
        self._start_bytes = number * plan.shard_bytes
        self._buffer = buffer
        self._chunks: Sequence[ChunkSpec] = plan.shard_chunks[number]
        self._is_whole = False  # whether all of it was read
        self.damages: list[Damage] = []

    def read(self, on_read: Callable[[int], object] | None) -> None:
        """Reads it; what of it can be had, if not all can."""
        whole: list[Damage] = []
        with noting(whole, self._store, self._path):
            self._store.read_into(
                self._path, self._plan.shard_bytes, [(0, self._buffer.data)], on_read
            )
            self._is_whole = True
            return
        size_bytes = self._plan.shard_bytes
        if not isinstance(self._store, BucketStore):
            size_bytes = self._store.size_bytes(self._path)
        leaves = leaves_of(self._plan, self._chunks) if size_bytes is None else ()
        self.damages += [Damage(one.path, one.text, leaves) for one in whole]
        there = () if size_bytes is None else self._chunks
        self._chunks = [chunk for chunk in there if self._read_chunk(chunk, size_bytes or 0)]

    def _read_chunk(self, chunk: ChunkSpec, size_bytes: int) -> bool:
        """Reads one chunk of a file of some size; tells whether it is there."""
        begin, end = self._range(chunk)
        before = len(self.damages)
        with noting(self.damages, self._store, self._path, leaves_of(self._plan, [chunk])):
            if end > size_bytes:
                raise CorruptBackupError(f"bytes {begin} to {end} are not there.")
            first = begin // PAGE_BYTES * PAGE_BYTES
            last = min(size_bytes, -(-end // PAGE_BYTES) * PAGE_BYTES)
            self._store.read_into(self._path, size_bytes, [(first, self._buffer.data[first:last])])
        return len(self.damages) == before

    def check(self, visit: Visit | None) -> None:
        """Checks what was read."""
        seals = bytearray()
        for chunk in self._chunks:
            begin, end = self._range(chunk)
            stored = bytes(self._buffer[end - CHECKSUM_BYTES : end])
            found = crc32c(self._buffer.data[begin : end - CHECKSUM_BYTES])
            seals += stored
            if found != int.from_bytes(stored, "little"):
                text = (
                    f"bytes {begin} to {end - CHECKSUM_BYTES}: expected CRC-32C "
                    f"{int.from_bytes(stored, 'little'):08x}, found {found:08x}."
                )
                self.damages.append(Damage(self._path, text, leaves_of(self._plan, [chunk])))
            elif visit is not None:
                visit(chunk, self._buffer[begin : begin + chunk.data_bytes])
        if not self._is_whole:
            return
        if not self.damages and crc32c(bytes(seals)) != self._digest:
            text = (
                f"expected the shard with digest {self._digest:08x}, found "
                f"{crc32c(bytes(seals)):08x}: a shard of another save."
            )
            leaves = leaves_of(self._plan, self._chunks)
            self.damages.append(Damage(self._path, text, leaves))
        self._check_gaps()

    def _check_gaps(self) -> None:
        """What lies between chunks is no array's, but is zeros where nothing was spoilt."""
        done = 0
        ranges = sorted(map(self._range, self._chunks))
        for begin, end in [*ranges, (self._plan.shard_bytes, 0)]:
            if self._buffer[done:begin].any():
                text = f"bytes {done} to {begin}, between arrays: expected zeros."
                self.damages.append(Damage(self._path, text))
            done = end

    def _range(self, chunk: ChunkSpec) -> tuple[int, int]:
        """Where a chunk and its checksum lie in the shard."""
        begin = chunk.offset_bytes - self._start_bytes
        return begin, begin + chunk.stored_bytes + CHECKSUM_BYTES


class ChunkReader:
    """Reads chunks of a backup in any order, each proved. Used by several threads.

    Attributes:
        plan: Its layout.
    """

    def __init__(
        self,
        store: Store,
        record: BackupRecord,
        plan: LayoutPlan,
        on_read: Callable[[int], object] | None = None,
    ) -> None:
        """Reads nothing yet."""
        self._store = store
        self._record = record
        self.plan = plan
        self._on_read = on_read
        self._seals: dict[int, bytes] = {}  # by offset, of all that was read

    def read(self, chunks: Iterable[ChunkSpec]) -> dict[int, Bytes]:
        """Returns the data of chunks, without padding, by their offset.

        Raises:
            CorruptBackupError: If one is damaged, naming its array.
            OSError: If it cannot be read.
        """
        found: dict[int, Bytes] = {}
        for shard, some in self._by_shard(chunks).items():
            path = f"{self._record.directory}/{orbax.shard_path(shard)}"
            start_bytes = shard * self.plan.shard_bytes
            pieces: list[tuple[int, memoryview]] = []
            for run in _join(some):
                begin = (run[0].offset_bytes - start_bytes) // PAGE_BYTES * PAGE_BYTES
                last = run[-1].offset_bytes - start_bytes + run[-1].stored_bytes + CHECKSUM_BYTES
                memory = allocate_pages(-(-last // PAGE_BYTES) * PAGE_BYTES - begin)
                pieces.append((begin, memory.data))
                for chunk in run:
                    at = chunk.offset_bytes - start_bytes - begin
                    found[chunk.offset_bytes] = memory[at:][: chunk.stored_bytes + CHECKSUM_BYTES]
            self._store.read_into(path, self.plan.shard_bytes, pieces, self._on_read)
            for chunk in some:
                data = found[chunk.offset_bytes]
                self._prove(chunk, data, path)
                found[chunk.offset_bytes] = data[: chunk.data_bytes]
        return found

    def finish(self) -> None:
        """Reads what was not read, and makes sure that all shards are of this very save.

        Raises:
            CorruptBackupError: If not, or if something is damaged.
        """
        left = [chunk for chunk in self.plan.chunks if chunk.offset_bytes not in self._seals]
        for some in batches_of(left):
            self.read(some)
        for number, expected in enumerate(self._record.shard_digests):
            chunks = self.plan.shard_chunks[number]
            found = crc32c(b"".join(self._seals[chunk.offset_bytes] for chunk in chunks))
            if found != expected:
                path = f"{self._record.directory}/{orbax.shard_path(number)}"
                raise CorruptBackupError(
                    f"{self._store.path(path)}: expected the shard with digest {expected:08x}, "
                    f"found {found:08x}: a shard of another save. `stepsave verify` looks for more."
                )

    def _prove(self, chunk: ChunkSpec, data: Bytes, path: str) -> None:
        stored = bytes(data[chunk.stored_bytes :])
        found = crc32c(data.data[: chunk.stored_bytes])
        if found != int.from_bytes(stored, "little"):
            leaf = "/".join(self.plan.leaves[chunk.leaf].path)
            raise CorruptBackupError(
                f"{self._store.path(path)}: data of {leaf!r}: expected CRC-32C "
                f"{int.from_bytes(stored, 'little'):08x}, found {found:08x}. `stepsave verify` "
                "looks for more."
            )
        self._seals[chunk.offset_bytes] = stored

    def _by_shard(self, chunks: Iterable[ChunkSpec]) -> dict[int, list[ChunkSpec]]:
        shards: dict[int, list[ChunkSpec]] = {}
        for chunk in sorted(chunks, key=lambda chunk: chunk.offset_bytes):
            shards.setdefault(chunk.offset_bytes // self.plan.shard_bytes, []).append(chunk)
        return shards


def batches_of(chunks: Iterable[ChunkSpec]) -> Iterator[list[ChunkSpec]]:
    """Yields chunks in their order, some MiB together or one that is larger."""
    batch: list[ChunkSpec] = []
    size_bytes = 0
    for chunk in chunks:
        if batch and size_bytes + chunk.stored_bytes > _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
        batch.append(chunk)
        size_bytes += chunk.stored_bytes
    if batch:
        yield batch


def _join(chunks: Sequence[ChunkSpec]) -> Iterator[list[ChunkSpec]]:
    """Yields runs of chunks that lie on the same pages, or on such that follow each other."""
    run: list[ChunkSpec] = []
    end = 0
    for chunk in chunks:
        if run and chunk.offset_bytes // PAGE_BYTES > -(-end // PAGE_BYTES):
            yield run
            run = []
        run.append(chunk)
        end = chunk.offset_bytes + chunk.stored_bytes + CHECKSUM_BYTES
    if run:
        yield run
