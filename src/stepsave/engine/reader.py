"""From a committed directory to verified arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stepsave.engine.extents import Extents, Needs, view_leaves
from stepsave.engine.known_files import TRAINING_PATH, is_training, training_path
from stepsave.errors import (
    ArenaMemoryError,
    BackupDirectoryError,
    CorruptBackupError,
)
from stepsave.format import orbax
from stepsave.format.checksum import crc32c
from stepsave.format.holding import HOLDING_PATH
from stepsave.format.layout import CHECKSUM_BYTES, PAGE_BYTES, decode_layout
from stepsave.format.records import BackupRecord, FileRecord, LayoutPlan, LeafSpec
from stepsave.format.tree import FlatState, decode_training, unflatten
from stepsave.snapshot.arena import pages_for
from stepsave.snapshot.arrays import SavedArray
from stepsave.snapshot.pages import Bytes, Pages
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = (
    "StoredBackup",
    "decode_plan",
    "read_backup",
    "read_files",
    "read_shard",
    "shard_digest",
)

Whole = tuple[
    Sequence[LeafSpec],
    Callable[[Sequence[LeafSpec], Sequence[SavedArray]], Sequence[SavedArray]],
]

_READ_THREADS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class StoredBackup:
    """A backup as it is on disk.

    Attributes:
        step: Its step.
        metadata: Its metadata.
        flat: Its state as it was saved, flat. Its arrays are views of `pages`, those of several
            chunks in pieces.
        ended: Whether its training has come to its end since.
        pages: The memory, lent as long as any of these views lives.
    """

    step: int
    metadata: dict[str, Any]
    flat: FlatState
    ended: bool
    pages: Pages

    @property
    def state(self) -> Any:
        """The state with whole NumPy arrays, in dicts, lists and tuples."""
        flat = self.flat
        return unflatten(flat.paths, [np.asarray(leaf) for leaf in flat.leaves], flat.notes)


def read_backup(
    store: Store,
    record: BackupRecord,
    helpers: Crew,
    needs: Needs | None = None,
    *,
    rank: int = 0,
    whole: Whole | None = None,
) -> StoredBackup:
    """Reads what a marker vouches for; every byte returned has matched a CRC-32C.

    All of it is read into memory that is an arena's afterwards, so that none is touched for the
    restore alone. Sizes of all files are checked before memory is allocated.

    Args:
        store: Where it is.
        record: What the marker says.
        helpers: Threads that read too.
        needs: Which parts of its arrays are needed; None for all.
        rank: Which process of its training this is.
        whole: If it is the part of a state that one process has kept: the arrays of the state, and
            what makes them of those that are read.

    Raises:
        ArenaMemoryError: If there is no memory for it.
        BackupDirectoryError: If it is such a part, and nobody says so, or the other way round.
        CorruptBackupError: If anything is missing, truncated or altered, naming the file.
        OSError: If the file system fails.
    """
    own = training_path(rank)
    own = own if any(file.path == own for file in record.files) else TRAINING_PATH
    some = (file for file in record.files if file.path == own or not is_training(file.path))
    files = read_files(store, record, helpers, tuple(some))
    if (HOLDING_PATH in files) != (whole is not None):
        raise BackupDirectoryError(
            f"{store.path(record.directory)}: expected a whole backup, found what one of several "
            "processes keeps on its disk. Restore it by as many processes with `local_dir=` as it "
            "was saved by, or restore what is in the bucket."
        )
    if own not in files:
        raise CorruptBackupError(f"{store.path(record.directory)}: expected {own}, found none.")
    plan = decode_plan(store, record, files)
    needs = needs or Needs()
    extents = Extents(plan, None if needs.regions is None else needs.regions(plan.leaves))
    numbers = [number for number in range(plan.shard_count) if extents.of_shard(number)]
    shards = [f"{record.directory}/{orbax.shard_path(number)}" for number in numbers]
    store.check_sizes(dict.fromkeys(shards, plan.shard_bytes))

    pages = _make_pages(store, plan, extents)
    memory = pages.lend()
    on_read = needs.counter(extents.size_bytes)
    helpers.share(
        numbers,
        lambda number: read_shard(store, record, plan, number, memory, extents, on_read),
        helpers=(store.lanes if store.is_remote else _READ_THREADS) - 1,
    )
    leaves: Sequence[SavedArray] = view_leaves(plan, memory, extents)
    specs: Sequence[LeafSpec] = plan.leaves
    if whole is not None:
        specs, join = whole
        leaves = join(plan.leaves, leaves)
    paths = [leaf.path for leaf in specs]
    source = str(store.path(f"{record.directory}/{own}"))
    training, notes = decode_training(files[own], source, paths, leaves)
    flat = FlatState(paths, list(leaves), notes)
    return StoredBackup(record.step, training["metadata"], flat, record.ended, pages)


def decode_plan(store: Store, record: BackupRecord, files: Mapping[str, bytes]) -> LayoutPlan:
    """Decodes the layout of a backup, by its files as they were read.

    Raises:
        CorruptBackupError: If there is none, or it is not that of the shards that are vouched for.
    """
    if orbax.LAYOUT_PATH not in files:
        raise CorruptBackupError(
            f"{store.path(record.directory)}: expected {orbax.LAYOUT_PATH}, found none."
        )
    source = str(store.path(f"{record.directory}/{orbax.LAYOUT_PATH}"))
    plan = decode_layout(files[orbax.LAYOUT_PATH], source)
    if (plan.shard_bytes, plan.shard_count) != (record.shard_bytes, len(record.shard_digests)):
        raise CorruptBackupError(
            f"{source}: describes {plan.shard_count} shards of {plan.shard_bytes} bytes, "
            f"but the commit marker {len(record.shard_digests)} of {record.shard_bytes}."
        )
    return plan


def _make_pages(store: Store, plan: LayoutPlan, extents: Extents) -> Pages:
    try:
        return pages_for(plan) if extents.is_all else Pages(max(PAGE_BYTES, extents.size_bytes))
    except (OSError, MemoryError) as e:
        raise ArenaMemoryError(
            f"{store.root}: cannot map {extents.size_bytes / 2**20:.0f} MiB of memory for the "
            f"backup: {e}. Free memory, raise the limit on it (ulimit -v), or use a larger machine."
        ) from e


def read_files(
    store: Store,
    record: BackupRecord,
    helpers: Crew,
    files: tuple[FileRecord, ...] | None = None,
) -> dict[str, bytes]:
    """Reads files that are proved as wholes, all or some, by their path in the backup.

    Raises:
        CorruptBackupError: If one is not what the marker vouches for.
        OSError: If it cannot be read.
    """
    files = record.files if files is None else files
    below = {file.path: f"{record.directory}/{file.path}" for file in files}
    if not store.is_remote:  # where that takes as long as reading them
        store.check_sizes({below[file.path]: file.size_bytes for file in files})
    contents: dict[str, bytes] = {}

    def read(number: int) -> None:
        file = files[number]
        data = store.read(below[file.path], file.size_bytes)
        found = crc32c(data)
        if found != file.crc32c:
            raise CorruptBackupError(
                f"{store.path(below[file.path])}: expected CRC-32C {file.crc32c:08x}, "
                f"found {found:08x}."
            )
        contents[file.path] = data

    count = len(files)
    helpers.share(range(count), read, helpers=min(store.lanes, count) - 1 if store.is_remote else 0)
    return contents


def read_shard(
    store: Store,
    record: BackupRecord,
    plan: LayoutPlan,
    number: int,
    memory: Bytes,
    extents: Extents | None = None,
    on_read: Callable[[int], object] | None = None,
) -> None:
    """Reads a shard, or some of it, into page-aligned memory, and verifies it there.

    Args:
        store: Where it is.
        record: The backup's.
        plan: Its layout.
        number: Which shard.
        memory: For the shard; for all that is read of the backup, if `extents` are given.
        extents: What is read; None for all of this shard.
        on_read: Told the size of each piece that was read.

    Raises:
        CorruptBackupError: If it is not what the marker vouches for.
        OSError: If it cannot be read.
    """
    path = f"{record.directory}/{orbax.shard_path(number)}"
    start_bytes = number * plan.shard_bytes
    pieces = [(0, memory.data)]
    if extents is not None:
        pieces = [
            (one.begin_bytes, memory.data[one.memory_bytes :][: one.end_bytes - one.begin_bytes])
            for one in extents.of_shard(number)
        ]
    if not pieces:
        return
    store.read_into(path, plan.shard_bytes, pieces, on_read)

    def find(offset_bytes: int, size_bytes: int) -> memoryview | None:
        at = offset_bytes - start_bytes
        if extents is not None:
            at = extents.find(offset_bytes, size_bytes)
        return None if at is None else memory.data[at : at + size_bytes]

    checksums = bytearray()
    for chunk in plan.shard_chunks[number]:
        seal = find(chunk.offset_bytes + chunk.stored_bytes, CHECKSUM_BYTES)
        assert seal is not None, "the checksums of all chunks are read"
        stored = bytes(seal)
        data = find(chunk.offset_bytes, chunk.stored_bytes)
        found = stored if data is None else crc32c(data).to_bytes(CHECKSUM_BYTES, "little")
        if found != stored:
            begin = chunk.offset_bytes - start_bytes
            raise CorruptBackupError(
                f"{store.path(path)}: data of {plan.leaves[chunk.leaf].name!r} (chunk "
                f"{chunk.grid}, bytes {begin} to {begin + chunk.stored_bytes}): expected CRC-32C "
                f"{int.from_bytes(stored, 'little'):08x}, found "
                f"{int.from_bytes(found, 'little'):08x}."
            )
        checksums += stored
    digest, expected = crc32c(bytes(checksums)), record.shard_digests[number]
    if digest != expected:
        raise CorruptBackupError(
            f"{store.path(path)}: expected the shard with digest {expected:08x}, found "
            f"{digest:08x}: a shard of another save."
        )


def shard_digest(plan: LayoutPlan, number: int, shard: Bytes) -> int:
    """Returns what `BackupRecord.shard_digests` says of a shard, from its checksums."""
    start_bytes = number * plan.shard_bytes
    seals = (chunk.offset_bytes + chunk.stored_bytes for chunk in plan.shard_chunks[number])
    begins = (seal - start_bytes for seal in seals)
    return crc32c(b"".join(bytes(shard.data[begin:][:CHECKSUM_BYTES]) for begin in begins))
