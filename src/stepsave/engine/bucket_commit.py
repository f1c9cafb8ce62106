"""The commit protocol in a bucket: which backup is valid, and who may say so.

Nothing can be renamed there, and no lock dies with its process. What there is: one object can be
replaced on condition that it is the one that was read. That object is `COMMIT`.

    1. claim    with the first save, `COMMIT` is replaced by one that names this run as the owner
    2. collect  what was there before and no marker names is removed: nobody can publish it now
    3. objects  written under names that nobody else writes to, `<run>/<step>/…`
    4. seal     the changing files, then `commit_success.txt`, for readers other than stepsave
    5. publish  `COMMIT` is replaced: this is the commit point
    6. retire   what is not to be kept is removed

Each replacement is on condition that `COMMIT` is what this run knew. So of two trainers with one
prefix the one that is too late is told, and neither can harm what the other has committed. A
process that was thought to be dead writes below its own name only, whenever it wakes up.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import socket
import time
from collections.abc import Mapping

from stepsave.engine.known_files import COMMIT, TRAINING_PATH
from stepsave.engine.markers import Markers
from stepsave.engine.retention import Retention
from stepsave.errors import BucketError, DirectoryBusyError
from stepsave.format import orbax
from stepsave.format.blueprint import Blueprint
from stepsave.format.marker import MARKER_LIMIT_BYTES, RUN_NAME, encode_claim
from stepsave.format.records import BackupRecord, Claim, FileRecord, LayoutPlan, Owner
from stepsave.snapshot.contents import Contents
from stepsave.store.bucket import NO_OBJECT, BucketStore

__all__ = ("BucketCommit",)

_logger = logging.getLogger("stepsave")

_OURS = re.compile(rf"({RUN_NAME}/\d+)/.*", re.ASCII | re.DOTALL)
_LATE_S = 300.0
"""For so long after a failure its requests may still be under way: longer than drivers try."""

_FIRST_DIGIT = "2"  # of all names of runs, until the year 3000


class BucketCommit(Markers):
    """The backups below one prefix. Used by one thread at a time."""

    def __init__(self, store: BucketStore, retention: Retention) -> None:
        """Reads the marker.

        Args:
            store: The bucket.
            retention: Which backups before the newest stay.

        Raises:
            BucketError: If it cannot be read.
        """
        super().__init__(store)
        self._objects = store
        self._retention = retention
        self._owner = Owner(_new_run(), socket.gethostname(), os.getpid())
        self._generation = NO_OBJECT  # of COMMIT, as this run knows it
        self._is_owner = False  # whether COMMIT names this run
        self._is_sure = True  # whether COMMIT was not written without an answer
        self._is_collected = False
        self._late_until_s = -math.inf  # when nothing of failed saves can arrive any more
        self._folder = self._owner.run
        self._directory = ""
        self._begin_ns = 0
        self.read_markers()
        problem = self.problems.get(COMMIT)
        if isinstance(problem, BucketError):
            raise problem

    def read_marker(self, name: str) -> bytes | None:
        """Reads a marker, and remembers which generation of it that was."""
        self._objects.check_at_most(name, MARKER_LIMIT_BYTES)
        encoded, self._generation = self._objects.read_versioned(name)
        return encoded

    def read_markers(self) -> None:
        """Takes from the bucket which backups are valid, and who may save."""
        super().read_markers()
        self._is_sure = not isinstance(self.problems.get(COMMIT), BucketError)
        self._is_owner = self.claim is not None and self.claim.owner == self._owner
        self._is_collected = self._is_collected and self._is_owner

    def fall_back(self, record: BackupRecord) -> None:
        """Declares those newer than a kept backup unreadable; the next save writes that down."""
        super().fall_back(record)
        self._is_owner = self._is_collected = False

    def begin(self, blueprint: Blueprint, step: int) -> str:
        """Makes ready to receive the shards of a new save; see `begin_with`."""
        return self.begin_with(blueprint.files, step)

    def begin_with(self, files: Mapping[str, bytes], step: int) -> str:
        """Writes the files of a backup, but the one that says that it is complete.

        Args:
            files: By path in the backup; without shards.
            step: Of the backup.

        Returns:
            The directory for the shards.

        Raises:
            CorruptBackupError: If the marker cannot be read, and so nobody knows what is valid.
            DirectoryBusyError: If somebody else saves below this prefix.
            BucketError: If the bucket refuses or does not answer.
        """
        if not self._is_sure:
            self._settle()
        if COMMIT in self.problems:
            raise self.problems[COMMIT]
        is_clean = self._is_collected and time.monotonic() >= self._late_until_s
        if not (self._is_owner and is_clean):
            self._claim(self.records)
        self._begin_ns = time.time_ns()
        self._directory = f"{self._folder}/{step}"
        self._write(files, but=orbax.SUCCESS_PATH)
        return self._directory

    def take_written(self, plan: LayoutPlan, numbers: range) -> None:
        """Returns None: what was written before lies under other names."""
        del plan, numbers

    def seal(
        self,
        blueprint: Blueprint,
        step: int,
        training: bytes,
        digests: tuple[int, ...],
        contents: Contents | None = None,
        files: tuple[FileRecord, ...] = (),
    ) -> BackupRecord:
        """Completes a backup, durably; see `CommitProtocol.seal`."""
        del contents
        changing = {
            TRAINING_PATH: training,
            orbax.METADATA_PATH: orbax.checkpoint_metadata(
                blueprint.items, self._begin_ns, time.time_ns()
            ),
        }
        self._write(changing)
        self.complete()
        changed = (FileRecord.of(path, data) for path, data in changing.items())
        return BackupRecord(
            step=step,
            directory=self._directory,
            nonce=os.urandom(16).hex(),
            files=(*sorted(blueprint.records, key=lambda file: file.path), *changed, *files),
            shard_bytes=blueprint.plan.shard_bytes,
            shard_digests=digests,
        )

    def complete(self) -> None:
        """Says to readers other than stepsave that the backup is complete."""
        self._write({orbax.SUCCESS_PATH: orbax.COMMIT_SUCCESS})

    def publish(self, record: BackupRecord) -> None:
        """Makes a sealed backup the valid one; on return it is committed, durably."""
        older = self.records
        try:
            self._replace((record, *self._retention.choose(older)))
        except DirectoryBusyError:
            self._remove_backup(record.directory)  # nobody else writes there, or will look for it
            raise
        try:
            for old in older:
                if old not in self.kept:
                    self._remove_backup(old.directory)
        except BucketError as e:
            # The new backup is committed all the same, so the save has not failed.
            _logger.warning("%s: could not remove an old backup: %s", self._objects.root, e)
            self._is_collected = False

    def abandon(self) -> None:
        """Gives up a save that failed.

        What was begun may arrive later, so the next one goes to a folder of its own. The marker
        may have been written without an answer: the next one looks.
        """
        self._folder = _new_run()
        self._is_sure = self._is_collected = False
        self._late_until_s = time.monotonic() + _LATE_S

    def mark_ended(self) -> None:
        """Notes with the newest backup that its training has come to its end."""
        if self.committed is not None and not self.committed.ended:
            self._replace((dataclasses.replace(self.committed, ended=True), *self.kept))

    def delete_all(self) -> None:
        """Removes every backup, the marker first, and nothing that stepsave did not write."""
        if not self._is_sure:
            self._settle()
        self.problems.clear()
        self._claim(())
        self._is_sure = False
        # Refused, somebody else has taken the place meanwhile. Nothing of this run is left in it.
        self._objects.write_if(COMMIT, None, self._generation)
        self._is_owner = False

    def _claim(self, records: tuple[BackupRecord, ...]) -> None:
        """Makes this run the one that may save, and removes what others and failed saves left.

        Looked for before: nobody can have claimed the place between that and the claim here, so
        whoever wrote what was found, and no marker names, can publish it no more. What is written
        by whoever claims the place next was not found.
        """
        directories = self.list_backups()
        self._replace(records)
        kept = {record.directory for record in records}
        for directory in directories:
            if directory not in kept:
                _logger.debug("%s: removing unreferenced %s", self._objects.root, directory)
                self._remove_backup(directory)
        self._is_collected = True

    def list_backups(self) -> dict[str, list[str]]:
        """Returns what objects there are by directory of a backup, valid or not, in order."""
        objects: dict[str, list[str]] = {}
        for match in map(_OURS.fullmatch, sorted(self._objects.list(_FIRST_DIGIT))):
            if match is not None:
                objects.setdefault(match[1], []).append(match[0])
        return objects

    def collect(self) -> None:
        """Removes what no marker names, and the marker if it names no backup.

        Takes the place from whoever saved here last; `find_rival` says whether that may go on.

        Raises:
            CorruptBackupError: If the marker cannot be read, and so nobody knows what is valid.
            DirectoryBusyError: If somebody else saves here.
        """
        if COMMIT in self.problems:
            raise self.problems[COMMIT]
        if self.records:
            self._claim(self.records)
        else:
            self.delete_all()

    def find_rival(self) -> Owner | None:
        """Returns who saved here last, unless that training is known to be over.

        It is if its backup says so, or if its process was on this machine and is gone.
        """
        if self.claim is None or (self.committed is not None and self.committed.ended):
            return None
        owner = self.claim.owner
        is_gone = owner.host == socket.gethostname() and not _is_running(owner.pid)
        return None if is_gone or owner == self._owner else owner

    def _replace(self, records: tuple[BackupRecord, ...]) -> None:
        """Replaces the marker, if it is the one that this run knows.

        Raises:
            DirectoryBusyError: If it is not: somebody else saves here.
        """
        encoded = encode_claim(Claim(self._owner, records))
        self._is_sure = False
        generation = self._objects.write_if(COMMIT, encoded, self._generation)
        if generation is None:
            # Somebody else's, or this very one: the answer was lost and it was sent again.
            found, now = self._objects.read_versioned(COMMIT)
            if found != encoded:
                self._refuse()
            generation = now
        self._generation = generation
        self.committed, self.kept = (records[0] if records else None), records[1:]
        self._is_owner = self._is_sure = True

    def _settle(self) -> None:
        """Finds out what the marker is, after a call that has brought no answer.

        Raises:
            DirectoryBusyError: If somebody else has replaced it.
        """
        known, was_owner = self._generation, self._is_owner
        committed, kept = self.committed, self.kept
        self.read_markers()
        if self._is_owner or COMMIT in self.problems or (self._generation == NO_OBJECT != known):
            return  # what it says holds
        if self._generation != known:
            self._generation = known
            self._refuse()
        # Unchanged, but perhaps for what this run alone knows: that the newest is unreadable.
        self.committed, self.kept, self._is_owner = committed, kept, was_owner

    def _refuse(self) -> None:
        self._is_sure = False  # so the next save will look again, and be refused again
        known = self._generation
        found = self.on_disk(COMMIT)
        self._generation = known  # nothing is remembered of it
        who = "somebody else"
        if isinstance(found, Claim):
            newest = f"step {found.backups[0].step}" if found.backups else "no backup yet"
            who = f"process {found.owner.pid} on {found.owner.host}, whose newest is {newest},"
        raise DirectoryBusyError(
            f"{self._objects.root}: {who} saves here too. Only one of the two trainings can: stop "
            "the other one and start this one again, or give each a prefix of its own. What was "
            "committed is whole, and nothing of it was changed."
        )

    def _remove_backup(self, directory: str) -> None:
        # First, so that no reader takes what is left of it for a backup.
        self._objects.remove(f"{directory}/{orbax.SUCCESS_PATH}")
        self._objects.remove_below(f"{directory}/")

    def _write(self, files: Mapping[str, bytes], but: str = "") -> None:
        below = {f"{self._directory}/{path}": d for path, d in files.items() if path != but}
        self._objects.write_all(below)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # the number of one that ended before this process began
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _new_run() -> str:
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(8).hex()}"
