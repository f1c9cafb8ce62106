"""How several processes bring a backup that each has on a disk of its own into one bucket.

Saves wait for nobody, so processes may be at different steps. Process 0 asks what the others hold,
and all hold that from then on. The newest step of these they upload, each its shards: those who are
behind come to it. What the bucket has then is what a save of all into it would have written.

    process 0                     the others
    ask n                    ──▶  hear it, if it comes soon after a save of theirs
    hears all               ◀──   holds n/rank: their newest step
    save n: step, directory  ──▶  and from here on as `agreement` says
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
import time
from collections.abc import Mapping

from stepsave.engine.agreement import (
    Following,
    Leading,
    Order,
    Report,
    patience_s,
)
from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.commit import CommitProtocol
from stepsave.engine.copying import copy_shards
from stepsave.engine.holdings import whole_files
from stepsave.engine.known_files import TRAINING_PATH
from stepsave.engine.peers import LIMIT_S
from stepsave.engine.reader import read_files, read_shard, shard_digest
from stepsave.engine.uploading import Upload
from stepsave.errors import PeerError
from stepsave.format import orbax
from stepsave.format.checksum import crc32c
from stepsave.format.holding import HOLDING_PATH, Holding, decode_holding
from stepsave.format.layout import decode_layout, encode_layout
from stepsave.format.records import BackupRecord, FileRecord
from stepsave.snapshot.pages import Bytes
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.store.shard_array import ShardArray
from stepsave.threads import Crew

__all__ = ("FollowedUpload", "LedUpload", "name_in_bucket")

ATTENTION_S = 60.0
"""How long after a save of its own a process listens whether process 0 wants to upload. Whoever
has missed it hears it after the next one."""

_LOOK_S = 0.02
_MOMENT_S = 5.0
_KEPT = 2
"""How many saves a process may be ahead of another. Each takes room on the disk meanwhile."""


def name_in_bucket(nonce: str) -> str:
    """Returns the nonce, in the bucket, of what has this one on disks: all know it by that."""
    return hashlib.sha256(f"in the bucket: {nonce}".encode()).hexdigest()[:32]


class _JointUpload(Upload):
    def __init__(self, local: LocalStore, bucket: BucketStore, disk: CommitProtocol) -> None:
        """Touches nothing yet.

        Args:
            local: Where to read.
            bucket: Where to write.
            disk: Which backups are valid where it reads.
        """
        super().__init__()
        self._local = local
        self._bucket = bucket
        self._disk = disk
        # The oldest step that may be agreed on, as long as none is; and what was kept for that.
        self._since: int | None = None
        self._kept: set[str] = set()

    def hold(self, record: BackupRecord) -> None:
        """Holds what is offered, and what comes after it."""
        self._hold_from(record)

    def holds(self, directory: str) -> bool:
        """Whether it is the backup that is agreed on, or might be."""
        if super().holds(directory) or directory in self._kept:
            return True
        since = self._since
        if since is None or int(directory) < since or len(self._kept) == _KEPT:
            return False
        self._kept.add(directory)
        return True

    def _hold_from(self, record: BackupRecord | None) -> None:
        """Holds a backup, and those that come after it, until it is clear which one is meant."""
        self._kept = set()
        self._since = -1 if record is None else record.step
        self.held = record

    def _hold_newest(self) -> BackupRecord | None:
        """Holds the newest backup, while saves go on.

        The keeper names a new one as valid before it asks whether the old one is held, and this
        looks again after it has held it: so at least one of them sees the other.
        """
        while True:
            record = self._disk.committed
            self._hold_from(record)
            if self._disk.committed is record:
                return record

    def _hold_step(self, step: int) -> BackupRecord:
        """Holds the backup of a step, which may be yet to come, and no other.

        Raises:
            PeerError: If it does not come, or is gone.
        """
        end_s, has_passed = time.monotonic() + LIMIT_S, False
        while True:
            is_last = self.is_last or self.is_off or time.monotonic() > end_s  # before it looks
            record, newest = self._disk.record_of(step), self._disk.committed
            if record is not None:
                self.held, self._since, self._kept = record, None, set()
                return record
            if is_last:
                break
            if newest is not None and newest.step >= step and not has_passed:
                # It is gone; unless it is being retired at this moment, and held.
                has_passed, end_s = True, time.monotonic() + _MOMENT_S
            time.sleep(_LOOK_S)
        self._since = None
        found = "none" if newest is None else f"step {newest.step}"
        raise PeerError(
            f"{self._local.root}: expected the backup of step {step}, which other processes "
            f"upload, found {found}. It is tried again after the next save."
        )

    def _is_over(self) -> bool:
        return self.is_off or not threading.main_thread().is_alive()

    def _read(self, record: BackupRecord, crew: Crew) -> tuple[Holding, Mapping[str, bytes]]:
        files = read_files(self._local, record, crew)
        source = str(self._local.path(f"{record.directory}/{HOLDING_PATH}"))
        return decode_holding(files[HOLDING_PATH], source), files

    def _write_shards(
        self,
        record: BackupRecord,
        holding: Holding,
        files: Mapping[str, bytes],
        directory: str,
        crew: Crew,
    ) -> tuple[int, ...]:
        """Copies the shards that are this process's in a backup of all; returns their digests."""
        plan = decode_layout(files[orbax.LAYOUT_PATH], str(self._local.path(record.directory)))
        first, count = holding.first_shard, holding.shard_count
        shards = ShardArray(self._bucket, directory, holding.plan)
        digests = [0] * count

        def write(number: int, shard: Bytes) -> None:
            digests[number] = shard_digest(holding.plan, first + number, shard)
            shards.write(first + number, shard)

        read = functools.partial(read_shard, self._local, record, plan)
        copy_shards(count, plan.shard_bytes, read, write, crew)
        return tuple(digests)


class LedUpload(_JointUpload):
    """What process 0 does."""

    def __init__(
        self,
        local: LocalStore,
        bucket: BucketStore,
        disk: CommitProtocol,
        remote: BucketCommit,
        leading: Leading,
    ) -> None:
        """Touches nothing yet; the protocol of the bucket is nobody else's meanwhile."""
        super().__init__(local, bucket, disk)
        self._remote = remote
        self._leading = leading

    def knows(self, record: BackupRecord) -> bool:
        """Whether it is the newest in the bucket."""
        there = self._remote.committed
        return there is not None and there.nonce == name_in_bucket(record.nonce)

    def bring(self, record: BackupRecord, crew: Crew) -> float:
        """Has all bring it, or a newer one that another process has got to already."""
        step = record.step
        try:
            step = max(step, self._leading.ask(LIMIT_S, self._is_over))
            saved_at_s, nonce = self._bring(self._hold_step(step), crew)
        except BaseException as e:
            try:
                self._leading.drop(step, e)
            except PeerError as more:
                e.add_note(f"The other processes could not be told: {more}")
            raise
        self._leading.end(nonce)
        return saved_at_s

    def _bring(self, record: BackupRecord, crew: Crew) -> tuple[float, str]:
        holding, held = self._read(record, crew)
        files = whole_files(held, holding, 0)
        directory = self._remote.begin_with(files, record.step)
        training = crc32c(files[TRAINING_PATH])
        self._leading.begin(Order(record.step, directory, "", training))
        digests = self._write_shards(record, holding, held, directory, crew)
        layout = crc32c(encode_layout(holding.plan))
        size_bytes = holding.shard_count * record.shard_bytes
        report = self._leading.gather(Report(layout, digests, ()), size_bytes)
        self._remote.complete()
        nonce = name_in_bucket(record.nonce)
        own = (FileRecord.of(path, data) for path, data in files.items())
        self._remote.publish(
            dataclasses.replace(
                record,
                directory=directory,
                nonce=nonce,
                files=(*own, *report.files),
                shard_digests=report.digests,
            )
        )
        return orbax.saved_at_s(files[orbax.METADATA_PATH]), nonce

    def abandon(self) -> None:
        """Has the next one go to another folder."""
        self._remote.abandon()


class FollowedUpload(_JointUpload):
    """What the others do."""

    def __init__(
        self,
        local: LocalStore,
        bucket: BucketStore,
        disk: CommitProtocol,
        following: Following,
        rank: int,
    ) -> None:
        """Touches nothing yet."""
        super().__init__(local, bucket, disk)
        self._following = following
        self._rank = rank
        self._uploaded = ""

    def hold(self, record: BackupRecord) -> None:
        """Holds nothing before it is asked."""
        del record
        self.held, self._since = None, None

    def knows(self, record: BackupRecord) -> bool:
        """Whether it was brought to the bucket with the help of this process."""
        return self._uploaded == name_in_bucket(record.nonce)

    def bring(self, record: BackupRecord, crew: Crew) -> float | None:
        """Brings its part of what process 0 names, if it wants to upload."""
        following = self._following
        if not following.await_ask(ATTENTION_S, self._is_over):
            return None
        mine = self._hold_newest()
        following.answer(-1 if mine is None else mine.step)
        size_bytes = record.shard_bytes * len(record.shard_digests)
        order = following.hear_upload(2 * patience_s(size_bytes))
        try:
            mine = self._hold_step(order.step)
            report, saved_at_s = self._bring(mine, order, crew)
        except BaseException as e:
            following.report(error=f"{type(e).__name__}: {e}")
            raise
        following.report(report)
        self._uploaded = following.hear_end(size_bytes)
        return saved_at_s

    def _bring(self, record: BackupRecord, order: Order, crew: Crew) -> tuple[Report, float]:
        holding, held = self._read(record, crew)
        digests = self._write_shards(record, holding, held, order.directory, crew)
        is_same = crc32c(held[TRAINING_PATH]) == order.training
        files = {} if is_same else whole_files(held, holding, self._rank)
        self._bucket.write_all({f"{order.directory}/{path}": files[path] for path in files})
        layout = crc32c(encode_layout(holding.plan))
        records = tuple(FileRecord.of(path, data) for path, data in files.items())
        return Report(layout, digests, records), orbax.saved_at_s(held[orbax.METADATA_PATH])

    def abandon(self) -> None:
        """Nothing to do: process 0 decides."""
