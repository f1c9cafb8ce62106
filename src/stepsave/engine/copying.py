"""A backup from one place to another, verified on the way and read back there."""

from __future__ import annotations

import dataclasses
import functools
import queue
from collections.abc import Callable, Mapping

from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.commit import CommitProtocol
from stepsave.engine.reader import decode_plan, read_files, read_shard
from stepsave.errors import BackupDirectoryError
from stepsave.format import orbax
from stepsave.format.blueprint import Blueprint
from stepsave.format.holding import HOLDING_PATH
from stepsave.format.records import BackupRecord, LayoutPlan
from stepsave.snapshot.pages import Bytes, allocate_pages
from stepsave.store.local import LocalStore
from stepsave.store.places import Store
from stepsave.store.shard_array import ShardArray
from stepsave.threads import Crew

__all__ = ("LANES", "Destination", "copy_backup", "copy_shards", "read_back")

LANES = 4
"""Shards under way at a time: enough for a usual network, and each takes a buffer of its size."""

Transfer = Callable[[int, Bytes], object]
"""Reads a shard, by its number, into memory; or writes it from there."""


def copy_shards(count: int, shard_bytes: int, read: Transfer, write: Transfer, crew: Crew) -> None:
    """Reads shards, and writes each when it is there, several at a time."""
    buffers: queue.SimpleQueue[Bytes] = queue.SimpleQueue()

    def copy(number: int) -> None:
        try:
            buffer = buffers.get_nowait()
        except queue.Empty:
            buffer = allocate_pages(shard_bytes)
        read(number, buffer)
        write(number, buffer)
        buffers.put(buffer)  # not after an error: a request that was given up may read it

    crew.share(range(count), copy, helpers=max(0, min(LANES, count) - 1))


@dataclasses.dataclass(frozen=True, slots=True)
class Destination:
    """Where a copy goes.

    Attributes:
        store: The directory or the bucket, which is held.
        protocol: Its protocol.
        direct: Whether shards can be written there around the page cache.
    """

    store: Store
    protocol: CommitProtocol | BucketCommit
    direct: bool

    def begin(self, plan: LayoutPlan, files: Mapping[str, bytes], step: int) -> str:
        """Makes ready to receive shards; returns the directory for them."""
        if isinstance(self.protocol, BucketCommit):
            return self.protocol.begin_with(files, step)
        constant = {path: files[path] for path in files if not self.protocol.is_changing(path)}
        return self.protocol.begin(Blueprint.of_files(plan, constant), step)

    def open_shards(self, directory: str, plan: LayoutPlan) -> Transfer:
        """Returns what writes a shard durably."""
        store = self.store
        if not (self.direct and isinstance(store, LocalStore)):
            return ShardArray(store, directory, plan).write
        return lambda number, shard: store.write_direct(
            f"{directory}/{orbax.shard_path(number)}", shard.data
        )

    def complete(self, files: Mapping[str, bytes]) -> None:
        """Writes the files that come last."""
        if isinstance(self.protocol, BucketCommit):
            self.protocol.complete()
        else:
            changing = {path: files[path] for path in files if self.protocol.is_changing(path)}
            self.protocol.complete(changing)

    def publish(self, copied: BackupRecord) -> BackupRecord:
        """Makes a copy that is complete the valid backup; returns its record."""
        if isinstance(self.protocol, CommitProtocol):
            copied = self.protocol.name(copied)
        self.protocol.publish(copied)
        return copied


def copy_backup(
    source: Store,
    record: BackupRecord,
    target: Destination,
    crew: Crew,
    note: Callable[[int], None],
    *,
    staged: bool = False,
) -> BackupRecord:
    """Copies a backup by the protocol of its destination, where it is valid on return.

    It has been read back there before it is published: what it replaces is valid until then.

    Args:
        source: Where it is.
        record: What the marker there says.
        target: Where it goes.
        crew: Threads that help.
        note: Told of bytes that were read and written, and again when they were read back. What
            it raises ends the copy.
        staged: Whether all of it is read into memory before the first is written: one that may be
            replaced soon is needed for the shortest time so.

    Returns:
        Its record there.

    Raises:
        BackupDirectoryError: If it is the part of one of several processes.
        CorruptBackupError: If it is damaged, or does not read back.
        OSError: If one of the places fails.
    """
    files = read_files(source, record, crew)
    if HOLDING_PATH in files:
        raise BackupDirectoryError(
            f"{source.path(record.directory)}: expected a whole backup, found what one of several "
            "processes keeps on its disk. Copy what is in the bucket."
        )
    plan = decode_plan(source, record, files)
    read = functools.partial(read_shard, source, record, plan)
    if staged:
        read = _stage(plan, read, crew)
    try:
        directory = target.begin(plan, files, record.step)
        write_shard = target.open_shards(directory, plan)

        def write(number: int, shard: Bytes) -> None:
            write_shard(number, shard)
            note(len(shard))

        copy_shards(plan.shard_count, plan.shard_bytes, read, write, crew)
        target.complete(files)
        copied = dataclasses.replace(record, directory=directory)
        read_back(target.store, copied, crew, note)
    except BaseException:
        target.protocol.abandon()
        raise
    return target.publish(copied)


def _stage(plan: LayoutPlan, read: Transfer, crew: Crew) -> Transfer:
    memory = allocate_pages(plan.arena_bytes)
    shards = [memory[at : at + plan.shard_bytes] for at in range(0, len(memory), plan.shard_bytes)]
    numbers = range(plan.shard_count)
    crew.share(numbers, lambda number: read(number, shards[number]), helpers=LANES - 1)

    def give(number: int, shard: Bytes) -> None:
        shard[:] = shards[number]

    return give


def read_back(store: Store, record: BackupRecord, crew: Crew, note: Callable[[int], None]) -> None:
    """Reads all of a backup, in the memory of a few shards.

    Args:
        store: Where it is.
        record: What the marker says.
        crew: Threads that help.
        note: Told of bytes that were read.

    Raises:
        CorruptBackupError: If it is damaged.
        OSError: If it cannot be read.
    """
    plan = decode_plan(store, record, read_files(store, record, crew))
    read = functools.partial(read_shard, store, record, plan)
    copy_shards(plan.shard_count, plan.shard_bytes, read, lambda _, shard: note(len(shard)), crew)
