"""A backup, or all of them, from one place to another."""

from __future__ import annotations

import dataclasses
import time

from stepsave.cli import jobs
from stepsave.cli.jobs import Job
from stepsave.cli.places import split_step
from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.choosing import find_backup, read_chosen
from stepsave.engine.copying import LANES, Destination, copy_backup, read_back
from stepsave.engine.directory import BackupDirectory
from stepsave.engine.markers import Markers
from stepsave.engine.retention import Retention
from stepsave.engine.saves import SaveLog
from stepsave.errors import BackupDirectoryError, DirectoryBusyError
from stepsave.format.records import BackupRecord
from stepsave.store.local import LocalStore
from stepsave.store.places import Store, open_store
from stepsave.threads import Crew

__all__ = ("Copied", "check_rival", "copy")


@dataclasses.dataclass(frozen=True, slots=True)
class Copied:
    """A backup that is where it was to be.

    Attributes:
        place: Where.
        step: Of the backup.
        size_bytes: Of its files, as the marker knows them.
        took_s: How long that took, with reading it back.
        was_there: Whether it was there before, and was only read.
    """

    place: str
    step: int
    size_bytes: int
    took_s: float
    was_there: bool


def copy(source: str, target: str, *, everything: bool, overwrite: bool) -> list[Copied]:
    """Copies the newest backup, those before it first if they are wanted too.

    Args:
        source: A place; `@STEP` after it means the backup of that step.
        target: A place.
        everything: Whether those before it are copied too.
        overwrite: Whether what is there may be replaced, though it is not older.

    Raises:
        ValueError: If one place lies in the other.
        BackupDirectoryError: If there is nothing to copy, or what is there must not be replaced.
        DirectoryBusyError: If somebody trains there.
        CorruptBackupError: If the backup is damaged, or does not read back.
    """
    place, step = split_step(source)
    here, there = open_store(place), open_store(target)
    _check_apart(here, there)
    here.check_directory()
    older = _steps_before(here, step) if everything else []

    def work(job: Job, crew: Crew) -> list[Copied]:
        find_backup(here, step)  # before anything is made there
        directory = BackupDirectory(there, SaveLog(), crew)
        is_new = isinstance(there, LocalStore) and not there.root.exists()
        try:
            directory.open("auto", there.lanes, Retention(len(older)))
            errand = _Errand(here, directory, there, job, crew, overwrite)
            brought = [errand.bring(one, is_older=True) for one in older]
            brought.append(errand.bring(step, is_older=False))
            return [one for one in brought if one is not None]
        finally:
            directory.release(remove=is_new and _is_empty(there))

    return jobs.do(work, max(here.lanes, there.lanes, LANES))


def check_rival(protocol: object, place: object, advice: str) -> None:
    """Refuses a bucket where somebody else may be training; a directory has a lock for that.

    Raises:
        DirectoryBusyError: If so.
    """
    rival = protocol.find_rival() if isinstance(protocol, BucketCommit) else None
    if rival is not None:
        raise DirectoryBusyError(
            f"{place}: process {rival.pid} on {rival.host} was the last to save here, and may be "
            f"training still: from here that cannot be seen, and it could save no more. {advice}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Errand:
    """From one place to another that is held."""

    source: Store
    directory: BackupDirectory
    target: Store
    job: Job
    crew: Crew
    overwrite: bool

    def bring(self, step: int | None, *, is_older: bool) -> Copied | None:
        """Copies one; None for one before the last, if what is there is newer than that."""
        began_s = time.perf_counter()

        def read(record: BackupRecord, attempt: int) -> tuple[BackupRecord, bool] | None:
            size_bytes = len(record.shard_digests) * record.shard_bytes
            protocol = self.directory.protocol
            for there in protocol.records:
                if there.nonce == record.nonce:
                    self.job.begin(f"verifying step {record.step}", size_bytes)
                    read_back(self.target, there, self.crew, self.job.note)
                    return there, True
            newest = protocol.committed
            is_newer = newest is not None and newest.step > record.step
            if is_older and is_newer and not self.overwrite:
                return None
            self._make_room(record)
            self.job.begin(f"copying step {record.step}", 2 * size_bytes)
            target = Destination(self.target, protocol, self.directory.writer_name == "direct")
            note = self.job.note
            copied = copy_backup(self.source, record, target, self.crew, note, staged=attempt > 0)
            return copied, False

        found = read_chosen(self.source, step, read)
        if found is None:
            return None
        record, was_there = found
        return Copied(
            place=str(self.target.root),
            step=record.step,
            size_bytes=record.size_bytes,
            took_s=time.perf_counter() - began_s,
            was_there=was_there,
        )

    def _make_room(self, record: BackupRecord) -> None:
        """Refuses to replace what must not be."""
        protocol, place = self.directory.protocol, self.target.root
        for problem in protocol.problems.values():
            if not self.overwrite:
                raise problem
        newest = protocol.committed
        if self.overwrite:
            if protocol.problems or (
                isinstance(self.target, LocalStore) and self.target.exists(str(record.step))
            ):
                protocol.delete_all()  # else two of the same name would have to be there at once
            return
        check_rival(protocol, place, "Stop it, or say --overwrite to take its place.")
        if newest is not None and newest.step >= record.step:
            raise BackupDirectoryError(
                f"{place}: expected no backup, or one older than step {record.step}, found step "
                f"{newest.step}. Choose another place, or say --overwrite to replace it. Nothing "
                "was changed."
            )


def _check_apart(here: Store, there: Store) -> None:
    one, other = str(here.root), str(there.root)
    if one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/"):
        raise ValueError(
            f"{there.root}: expected another place than {here.root}, neither in it nor around it: "
            "a backup directory holds nothing else."
        )


def _steps_before(store: Store, step: int | None) -> list[int]:
    """Returns the steps of the backups before one, or before the newest, oldest first."""
    last = find_backup(store, step).step
    markers = Markers(store)
    markers.read_markers()
    return sorted(record.step for record in markers.records if record.step < last)


def _is_empty(store: Store) -> bool:
    markers = Markers(store)
    markers.read_markers()
    return not markers.records
