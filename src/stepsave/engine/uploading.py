"""From a committed backup on disk to one in a bucket, while training and saves go on."""

from __future__ import annotations

import abc
import dataclasses
import functools
import time

from stepsave.engine.agreement import SkippedError
from stepsave.engine.arguments import parse_time_s
from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.copying import LANES, copy_shards
from stepsave.engine.reader import decode_plan, read_files, read_shard
from stepsave.engine.saves import SaveLog
from stepsave.errors import BackupDirectoryError, PeerError
from stepsave.format import orbax
from stepsave.format.records import BackupRecord
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.store.shard_array import ShardArray
from stepsave.threads import Call, Crew

__all__ = ("LoneUpload", "Upload", "UploadPace", "Uploader")


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
        seconds = parse_time_s(value)
        if seconds is not None:
            return cls(1, seconds)
        raise ValueError(
            f"Invalid value for argument `upload_every`. Received: upload_every={value!r}. "
            "Expected a positive number of saves, or a time such as '30s', '5min' or '1h'."
        )


class Upload(abc.ABC):
    """How one backup of a directory gets into a bucket. For the thread that uploads.

    Attributes:
        held: What must stay as it is on the disk, while it is under way.
        is_last: Whether the keeper waits for its end, so that no other backup comes meanwhile.
        is_off: Whether nothing is to be begun any more that would wait for other processes.
    """

    def __init__(self) -> None:
        self.held: BackupRecord | None = None
        self.is_last = self.is_off = False

    def hold(self, record: BackupRecord) -> None:
        """Takes note of what comes next; for the keeper's thread."""
        self.held = record

    def holds(self, directory: str) -> bool:
        """Whether a backup must stay; for the keeper's thread, which is about to retire it."""
        return self.held is not None and self.held.directory == directory

    @abc.abstractmethod
    def knows(self, record: BackupRecord) -> bool:
        """Whether a backup is in the bucket."""

    @abc.abstractmethod
    def bring(self, record: BackupRecord, crew: Crew) -> float | None:
        """Brings it there; returns when it was saved, None if another one was to be.

        Raises:
            Exception: Whatever comes between.
        """

    @abc.abstractmethod
    def abandon(self) -> None:
        """Takes note that it was not brought there."""


class LoneUpload(Upload):
    """Brings what this process alone has saved."""

    def __init__(self, local: LocalStore, bucket: BucketStore, remote: BucketCommit) -> None:
        """Touches nothing yet.

        Args:
            local: Where to read.
            bucket: Where to write.
            remote: The protocol there, which nobody else uses while an upload is under way.
        """
        super().__init__()
        self._local = local
        self._bucket = bucket
        self._remote = remote

    def knows(self, record: BackupRecord) -> bool:
        """Whether it is the newest there."""
        there = self._remote.committed
        return there is not None and there.nonce == record.nonce

    def bring(self, record: BackupRecord, crew: Crew) -> float:
        """Copies it; see `Upload.bring`."""
        files = read_files(self._local, record, crew)
        plan = decode_plan(self._local, record, files)
        directory = self._remote.begin_with(files, record.step)
        shards = ShardArray(self._bucket, directory, plan)
        read = functools.partial(read_shard, self._local, record, plan)
        copy_shards(plan.shard_count, plan.shard_bytes, read, shards.write, crew)
        self._remote.complete()
        self._remote.publish(dataclasses.replace(record, directory=directory))
        return orbax.saved_at_s(files[orbax.METADATA_PATH])

    def abandon(self) -> None:
        """Has the next one go to another folder."""
        self._remote.abandon()


class Uploader:
    """Uploads the newest backup of a directory, one at a time. For the keeper's thread.

    What it reads stays as it is meanwhile: the commit protocol asks `is_reading`.
    """

    def __init__(self, upload: Upload, place: str, pace: UploadPace, log: SaveLog) -> None:
        """Starts its threads.

        Args:
            upload: How it is done.
            place: Where to, for texts.
            pace: How often.
            log: Told how uploads end.

        Raises:
            BackupDirectoryError: If so many threads cannot be started.
        """
        self._upload = upload
        self._pace = pace
        self._log = log
        self._make_due()  # so that the first one goes up at once
        self._tried: BackupRecord | None = None  # the last one that was, or was not, brought there
        self._call: Call[None] | None = None
        try:
            self._crew = Crew(LANES, "stepsave-uploader")
            log.clocks.append(self._crew.clock)
        except RuntimeError as e:
            raise BackupDirectoryError(
                f"{place}: cannot start {LANES} threads for uploads: {e}. Raise the limit "
                "on threads (ulimit -u)."
            ) from e

    def is_reading(self, directory: str) -> bool:
        """Whether a directory is needed as it is."""
        return self._is_busy and self._upload.holds(directory)

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
        self._wait()
        tried = self._tried
        if not self._upload.knows(record) and (tried is None or tried.nonce != record.nonce):
            self._begin(record)
            self._wait()

    def wait(self) -> None:
        """Returns when none is under way; each has a limit, and waits for nobody else from now."""
        self._upload.is_off = True
        self._wait()
        self._upload.is_off = False

    def _wait(self) -> None:
        self._upload.is_last = True
        if self._call is not None:
            self._call.done.wait()
        self._upload.is_last = False

    def _make_due(self) -> None:
        """Has the next one go up: what processes have missed is no reason to wait for long."""
        self._since = self._pace.saves - 1
        self._begun_s = -self._pace.seconds

    def end(self) -> None:
        """Ends its threads when none is under way."""
        self._crew.end()

    def _begin(self, record: BackupRecord) -> None:
        self._upload.hold(record)
        self._call = self._crew.begin(lambda: self._bring(record))

    def _bring(self, record: BackupRecord) -> None:
        upload = self._upload
        try:
            saved_at_s = upload.bring(record, self._crew)
        except SkippedError:
            self._make_due()
            upload.abandon()
        except BaseException as e:  # noqa: BLE001  kept, and raised or warned of at the next call
            if isinstance(e, PeerError):
                self._make_due()
            upload.abandon()
            self._tried = upload.held
            self._log.note_failed_upload((upload.held or record).step, e)
        else:
            if saved_at_s is not None:
                self._tried = upload.held
                self._log.note_upload((upload.held or record).step, saved_at_s)
