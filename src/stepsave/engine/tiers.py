"""Two tiers: backups on a fast disk of the machine, and the newest of them in a bucket.

Saves are those of the directory, and wait for nothing else. What is lost with the machine is what
was saved since the last upload.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.commit import CommitProtocol
from stepsave.engine.directory import BackupDirectory
from stepsave.engine.extents import Needs
from stepsave.engine.follower import FollowerDirectory
from stepsave.engine.reader import StoredBackup, read_files
from stepsave.engine.retention import Retention
from stepsave.engine.saves import SaveLog
from stepsave.engine.uploading import LoneUpload, Upload, Uploader, UploadPace
from stepsave.engine.writer import SaveRequest, WriterKind
from stepsave.errors import BucketError, CorruptBackupError
from stepsave.format import orbax
from stepsave.format.records import BackupRecord
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.threads import Crew

__all__ = ("TieredDirectory", "Tiers", "step_of")


class Tiers:
    """A directory and a bucket as one; else as `BackupDirectory`. For the keeper's thread."""

    saves_here = True

    def __init__(
        self,
        bucket: BucketStore,
        local: BackupDirectory,
        remote: BackupDirectory | FollowerDirectory,
        log: SaveLog,
        helpers: Crew,
    ) -> None:
        """Touches nothing yet.

        Args:
            bucket: The bucket.
            local: What is kept on the disk.
            remote: What is kept in the bucket.
            log: Told how uploads end.
            helpers: Threads that read and write.
        """
        self._bucket = bucket
        self._local = local
        self._remote = remote
        self._log = log
        self._helpers = helpers
        self._uploader: Uploader | None = None
        self._is_open = False

    def _begin_uploads(self, upload: Upload, pace: UploadPace, disk: CommitProtocol) -> None:
        """Ends the opening: both are open, and what is on the disk may go up from now on."""
        self.writer_name = self._local.writer_name
        self._uploader = Uploader(upload, str(self._bucket.root), pace, self._log)
        disk.is_read = self._uploader.is_reading
        self._note_remote()
        self._is_open = True

    def _note_remote(self) -> None:
        """Finds out how old the newest backup in the bucket is."""
        record = self._remote.committed
        if record is not None:
            metadata = tuple(f for f in record.files if f.path == orbax.METADATA_PATH)
            files = read_files(self._bucket, record, self._helpers, metadata)
            self._log.note_upload(record.step, orbax.saved_at_s(files[orbax.METADATA_PATH]))

    @property
    def is_held(self) -> bool:
        """Whether it is this process's to use."""
        return self._local.is_held and self._remote.is_held

    @property
    def is_released(self) -> bool:
        return self._local.is_released

    def check_held(self) -> None:
        """Raises unless it is this process's to use."""
        self._local.check_held()

    def check_writable(self) -> None:
        """Raises if nothing can be saved here on principle."""

    def write(self, request: SaveRequest) -> None:
        """Makes a save durable on the disk, and has it uploaded if it is time."""
        assert self._uploader is not None
        self._local.write(request)
        record = self._local.committed
        if record is not None and record.step == request.handle.step and request.handle.durable_s:
            self._uploader.offer(record)

    def pass_over(self, step: int) -> None:
        """Nothing to do: no other process waits for saves of this one."""

    def upload(self) -> None:
        """Returns when the newest backup is in the bucket; what fails is noted."""
        assert self._uploader is not None
        record, there = self._local.committed, None
        if isinstance(self._remote, BackupDirectory):  # else process 0 knows, and decides
            there = self._remote.committed
        if record is not None and record.step >= step_of(there):
            self._uploader.bring(record)

    def mark_ended(self) -> None:
        """Notes with the newest backup, at both places, that its training has come to its end."""
        self._local.mark_ended()
        self.upload()
        self._remote.mark_ended()

    def delete_backup(self) -> None:
        """Removes every backup at both places, and nothing that stepsave did not write."""
        assert self._uploader is not None
        self._uploader.wait()
        self._local.delete_backup()
        self._remote.delete_backup()

    def release(self, *, remove: bool = False) -> None:
        """Lets go of both, when nothing is under way any more."""
        if self._uploader is not None and self.is_held:  # its threads are not a forked child's
            if self._is_open and not remove:
                self.upload()
            self._uploader.wait()
            self._uploader.end()
            self._leave()
        self._local.release(remove=remove)
        self._remote.release(remove=remove)

    def _leave(self) -> None:
        """Tells other processes, if there are any, that nothing is uploaded any more."""


def step_of(record: BackupRecord | None) -> int:
    """Returns the step of a backup; less than any if there is none."""
    return -1 if record is None else record.step


class TieredDirectory(Tiers):
    """Those of one process."""

    def __init__(
        self, bucket: BucketStore, local: LocalStore, pace: UploadPace, log: SaveLog, helpers: Crew
    ) -> None:
        """Touches nothing yet."""
        self._local_store = local
        self._pace = pace
        self._there = BackupDirectory(bucket, SaveLog(), helpers)
        on_disk = BackupDirectory(local, log, helpers)
        super().__init__(bucket, on_disk, self._there, log, helpers)

    def open(self, writer: WriterKind, lanes: int, retention: Retention) -> int:
        """Opens both; see `BackupDirectory.open`. At most one old backup stays here."""
        steps = (
            self._there.open("auto", lanes, retention),
            self._local.open(writer, lanes, Retention(min(retention.recent, 1))),
        )
        remote, local = self._there.protocol, self._local.protocol
        assert isinstance(remote, BucketCommit)
        assert isinstance(local, CommitProtocol)
        self._on_disk = local
        upload = LoneUpload(self._local_store, self._bucket, remote)
        self._begin_uploads(upload, self._pace, local)
        return max(steps)

    @property
    def committed(self) -> BackupRecord | None:
        """The newest valid backup, wherever it is."""
        return self._newest_first()[0].committed

    @property
    def kept(self) -> tuple[BackupRecord, ...]:
        """The backups before it that are kept at either place, newest first."""
        places = (self._there, self._local)
        some = {record.step: record for place in places for record in place.protocol.records}
        return tuple(some[step] for step in sorted(some, reverse=True)[1:])

    def _newest_first(self) -> Sequence[BackupDirectory]:
        """Both; the directory first if they have the same."""
        places = (self._local, self._there)
        return sorted(places, key=lambda place: -step_of(place.committed))

    def restore(
        self, needs: Needs | None = None, step: int | None = None
    ) -> tuple[StoredBackup | None, str]:
        """Reads the newest backup that can be read; what is lost by that is told.

        Raises:
            CorruptBackupError: If there is one, but none that can be read.
            BucketError: If the newest is in the bucket, and that is out of reach.
        """
        assert self._uploader is not None
        self._uploader.wait()
        for place in (self._local, self._there):
            place.protocol.read_markers()
        if step is not None:
            is_here = any(record.step == step for record in self._on_disk.records)
            return (self._local if is_here else self._there).restore(needs, step)
        found, lost = self._restore_newest(needs)
        on_disk = self._on_disk
        found_step = -1 if found is None else found.step
        if on_disk.problems or step_of(on_disk.committed) > found_step:
            on_disk.forget()  # or it would be in the way of the saves to come
        return found, lost

    def _restore_newest(self, needs: Needs | None) -> tuple[StoredBackup | None, str]:
        first, second = self._newest_first()
        if self._on_disk.problems and self._there.committed is not None:
            first, second = self._local, self._there  # which says why it cannot be read
        try:
            found, lost = first.restore(needs)
            if not lost or step_of(second.committed) <= step_of(first.committed):
                return found, lost
        except BucketError:
            raise
        except Exception as e:
            if second.committed is None:
                raise
            lost = f"stepsave: {e}"
        found, lost_too = second.restore(needs)
        if found is None:
            raise CorruptBackupError(f"{second.place}: its backup went while it was looked for.")
        return found, f"{lost} Restored step {found.step} from {second.place} instead. {lost_too}"
