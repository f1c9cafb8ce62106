"""From a committed backup on disk to one in a bucket, while training and saves go on."""

from __future__ import annotations

import dataclasses
import queue
import re
import time

from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.reader import read_files, read_shard
from stepsave.engine.saves import SaveLog
from stepsave.errors import BackupDirectoryError
from stepsave.format import orbax
from stepsave.format.layout import decode_layout
from stepsave.format.records import BackupRecord
from stepsave.snapshot.pages import Bytes, allocate_pages
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.store.shard_array import ShardArray
from stepsave.threads import Call, Crew

__all__ = ("UploadPace", "Uploader")

_LANES = 4
"""Shards under way at a time: enough for a usual network, and each takes a buffer of its size."""

_UNITS_S = {"s": 1, "min": 60, "h": 3600}


@dataclasses.dataclass(frozen=True, slots=True)
class UploadPace:
    """How often to upload: each n-th backup, or when so many seconds have passed.

    Attributes:
        saves: Every how many committed backups; 1 if that does not matter.
        seconds: At least how long after the last one was begun.
    """

    saves: int
    seconds: float

    @classmethod
    def of(cls, value: object) -> UploadPace:
        """Returns what a number of saves, or a time such as `"30s"`, stands for.

        Raises:
            ValueError: If it is neither.
        """
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return cls(value, 0.0)
        form = r"(\d+(?:\.\d+)?) ?(s|min|h)"
        if isinstance(value, str) and (match := re.fullmatch(form, value)) is not None:
            return cls(1, float(match[1]) * _UNITS_S[match[2]])
        raise ValueError(
            f"Invalid value for argument `upload_every`. Received: upload_every={value!r}. "
            "Expected a positive number of saves, or a time such as '30s', '5min' or '1h'."
        )


class Uploader:
    """Uploads the newest backup of a directory, one at a time. For the keeper's thread.

    What it reads stays as it is meanwhile: the commit protocol asks `is_reading`.
    """

    def __init__(
        self,
        local: LocalStore,
        bucket: BucketStore,
        remote: BucketCommit,
        pace: UploadPace,
        log: SaveLog,
    ) -> None:
        """Starts its threads.

        Args:
            local: Where to read.
            bucket: Where to write.
            remote: The protocol there, which nobody else uses while an upload is under way.
            pace: How often.
            log: Told how uploads end.

        Raises:
            BackupDirectoryError: If so many threads cannot be started.
        """
        self._local = local
        self._bucket = bucket
        self._remote = remote
        self._pace = pace
        self._log = log
        self._since = pace.saves - 1  # so that the first one goes up at once
        self._begun_s = -pace.seconds
        self._record: BackupRecord | None = None  # the last one that was begun with
        self._call: Call[None] | None = None
        try:
            self._crew = Crew(_LANES, "stepsave-uploader")
        except RuntimeError as e:
            raise BackupDirectoryError(
                f"{bucket.root}: cannot start {_LANES} threads for uploads: {e}. Raise the limit "
                "on threads (ulimit -u)."
            ) from e

    def is_reading(self, directory: str) -> bool:
        """Whether a directory is needed as it is."""
        record = self._record
        return self._is_busy and record is not None and record.directory == directory

    @property
    def _is_busy(self) -> bool:
        return self._call is not None and not self._call.done.is_open

    def offer(self, record: BackupRecord) -> None:
        """Begins to upload a backup that was just committed, if it is time and none under way."""
        self._since += 1
        now_s = time.monotonic()
        is_due = self._since >= self._pace.saves and now_s - self._begun_s >= self._pace.seconds
        if is_due and not self._is_busy:
            self._since, self._begun_s = 0, now_s
            self._begin(record)

    def bring(self, record: BackupRecord) -> None:
        """Returns when a backup is in the bucket, or was tried to be brought there."""
        self.wait()
        known = (self._record, self._remote.committed)
        if all(one is None or one.nonce != record.nonce for one in known):
            self._begin(record)
            self.wait()

    def wait(self) -> None:
        """Returns when none is under way; each has a limit."""
        if self._call is not None:
            self._call.done.wait()

    def end(self) -> None:
        """Ends its threads when none is under way."""
        self._crew.end()

    def _begin(self, record: BackupRecord) -> None:
        self._record = record
        self._call = self._crew.begin(lambda: self._upload(record))

    def _upload(self, record: BackupRecord) -> None:
        try:
            self._copy(record)
        except BaseException as e:  # noqa: BLE001  kept, and raised or warned of at the next call
            self._remote.abandon()
            self._log.note_failed_upload(record.step, e)

    def _copy(self, record: BackupRecord) -> None:
        files = read_files(self._local, record, self._crew)
        source = str(self._local.path(f"{record.directory}/{orbax.LAYOUT_PATH}"))
        plan = decode_layout(files[orbax.LAYOUT_PATH], source)
        directory = self._remote.begin_with(files, record.step)
        shards = ShardArray(self._bucket, directory, plan)
        buffers: queue.SimpleQueue[Bytes] = queue.SimpleQueue()

        def copy(number: int) -> None:
            try:
                buffer = buffers.get_nowait()
            except queue.Empty:
                buffer = allocate_pages(plan.shard_bytes)
            read_shard(self._local, record, plan, number, buffer)
            shards.write(number, buffer)
            buffers.put(buffer)  # not after an error: a request that was given up may read it

        self._crew.share(range(plan.shard_count), copy, helpers=min(_LANES, plan.shard_count) - 1)
        self._remote.complete()
        self._remote.publish(dataclasses.replace(record, directory=directory))
        self._log.note_upload(record.step, orbax.saved_at_s(files[orbax.METADATA_PATH]))
