"""What lies beside the backups at a place, and its removal."""

from __future__ import annotations

import dataclasses

from stepsave.cli import jobs
from stepsave.cli.copying import check_rival
from stepsave.cli.jobs import Job
from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.commit import CommitProtocol
from stepsave.engine.directory import BackupDirectory
from stepsave.engine.leftovers import Leftover, find_leftovers, remove_leftovers
from stepsave.engine.retention import Retention
from stepsave.engine.saves import SaveLog
from stepsave.store.bucket import BucketStore
from stepsave.store.places import Store, open_store
from stepsave.threads import Crew

__all__ = ("Found", "collect", "look")


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What is at a place.

    Attributes:
        place: The directory, or the URL.
        valid: Steps of the valid backups, newest first.
        leftovers: What lies beside them; or what was removed.
    """

    place: str
    valid: tuple[int, ...]
    leftovers: tuple[Leftover, ...]


def look(directory: str) -> Found:
    """Looks, and changes nothing.

    Raises:
        BackupDirectoryError: If there is no such place, or it holds something else too.
        CorruptBackupError: If a marker cannot be read: then nobody knows what is valid.
    """
    store = open_store(directory)
    store.check_directory()

    def work(job: Job, _: Crew) -> Found:
        job.begin("looking", None)
        # As for one who would save: so it is refused where nobody could.
        if isinstance(store, BucketStore):
            return _find(store, BucketCommit(store, Retention(0)))
        return _find(store, CommitProtocol(store, Retention(0)))

    return jobs.do(work, 1)


def collect(directory: str, *, force: bool) -> Found:
    """Removes what is left over; returns what that was.

    Args:
        directory: The place.
        force: Whether to do so in a bucket where somebody else may be training.

    Raises:
        DirectoryBusyError: If somebody trains there.
        BackupDirectoryError, CorruptBackupError: As `look`.
    """
    before = look(directory).leftovers  # opening it removes some, too
    store = open_store(directory)

    def work(job: Job, crew: Crew) -> Found:
        job.begin("removing", None)
        held = BackupDirectory(store, SaveLog(), crew)
        try:
            held.open("auto", 1, Retention(0))  # nothing is saved
            found = _find(store, held.protocol)
            if found.leftovers and not force:
                check_rival(held.protocol, store.root, "When it has ended, say --force.")
            if found.leftovers:  # else a bucket would be taken from its training for nothing
                remove_leftovers(held.protocol)
            left = {one.path for one in _find(store, held.protocol).leftovers}
        finally:
            held.release()
        some = {one.path: one for one in (*before, *found.leftovers)}
        gone = tuple(some[path] for path in sorted(some) if path not in left)
        return dataclasses.replace(found, leftovers=gone)

    return jobs.do(work, store.lanes)


def _find(store: Store, protocol: CommitProtocol | BucketCommit) -> Found:
    valid = tuple(record.step for record in protocol.records)
    return Found(str(store.root), valid, tuple(find_leftovers(store, protocol)))
