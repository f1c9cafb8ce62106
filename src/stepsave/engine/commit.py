"""The commit protocol: which backup is valid, at every instant.

A marker file (`stepsave.format.marker`) names the valid backup, and proves it.

    1. begin    the retired directory, `spare`, is made ready (or a new one made)
    2. shards   written into it and synced, by `stepsave.engine.writer`
    3. seal     the remaining files are written and synced; `spare` is renamed to its step
    4. publish  the marker `COMMIT` is replaced atomically: this is the commit point
    5. retire   the backup that was valid before becomes `spare`

If some before the newest are kept, a second marker, `PREVIOUS`, names them all, and the oldest that
is not to be kept is retired. A crash between any two operations leaves the old backup valid or
the new one; what it leaves lying about is removed by the next `begin`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping

from stepsave.engine.known_files import (
    COMMIT,
    PREVIOUS,
    SPARE,
    TEMPORARY_NAMES,
    TRAINING_PATH,
    is_spare,
    is_training,
    refuse_foreign,
    remove_known,
)
from stepsave.engine.markers import Markers
from stepsave.engine.retention import Retention
from stepsave.errors import BackupDirectoryError
from stepsave.format import orbax
from stepsave.format.blueprint import Blueprint
from stepsave.format.marker import encode_marker
from stepsave.format.records import BackupRecord, FileRecord, LayoutPlan
from stepsave.snapshot.contents import Contents
from stepsave.store.local import LocalStore
from stepsave.store.lock import READ_ONLY_ADVICE

__all__ = ("CommitProtocol", "Written")

_logger = logging.getLogger("stepsave")


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """What shards are known to hold.

    Attributes:
        plan: The layout.
        contents: What this process wrote there.
        nonce: Of the backup that they were.
    """

    plan: LayoutPlan
    contents: Contents
    nonce: str


class CommitProtocol(Markers):
    """The backups in one directory. Used by one thread at a time."""

    def __init__(self, store: LocalStore, retention: Retention, *, is_shared: bool = False) -> None:
        """Looks at the directory and refuses it if something in it is not stepsave's.

        Args:
            store: The directory.
            retention: Which backups before the newest stay.
            is_shared: Whether other processes write there too: then no name of a directory that
                is not valid is ever used twice. A machine that has one name in its cache, or was
                halted before it opened a file, could else write into a backup that has become
                valid meanwhile.

        Raises:
            BackupDirectoryError: If the directory holds something foreign.
        """
        super().__init__(store)
        self._files = store
        self._retention = retention
        self._is_shared = is_shared
        self._spare = self._name_spare()
        self._spare_of: frozenset[FileRecord] = frozenset()  # what `spare` is known to hold
        # What shards are known to hold, by directory: what this object has seen made durable.
        self._written: dict[str, Written] = {}
        self._collected = False
        # Directories that somebody still reads when they are retired, and those that are read now.
        self._left: list[BackupRecord] = []
        self.is_read: Callable[[str], bool] = lambda _: False
        self.make_nonce: Callable[[int], str] = lambda _: os.urandom(16).hex()
        self._begin_ns = 0
        self.read_markers()
        if self.claim is not None:
            raise BackupDirectoryError(
                f"{store.root}: expected a directory of stepsave's own, found a copy of a bucket, "
                f"which can only be read. {READ_ONLY_ADVICE} To train on here, choose another "
                "`backup_dir`. Nothing was changed."
            )
        refuse_foreign(store, self._names())

    @staticmethod
    def is_changing(path: str) -> bool:
        """Whether a file is written anew by each save, beside the shards."""
        return path == orbax.METADATA_PATH or is_training(path)

    def fall_back(self, record: BackupRecord) -> None:
        """Declares those newer than a kept backup unreadable: it is the newest now.

        Takes effect on disk with the next `begin`, when training has gone on from
        there; until then nothing is touched, in case the fault passes.
        """
        super().fall_back(record)
        self._collected = False

    def begin(self, blueprint: Blueprint, step: int) -> str:
        """Makes a directory ready to receive the shards of a new save; returns its name.

        Args:
            blueprint: What all backups of this layout have in common.
            step: Of the save.

        Raises:
            CorruptBackupError: If a marker cannot be read, so that nobody knows what is valid.
            OSError: If the file system refuses.
        """
        del step  # the directory gets its name when it is complete
        if COMMIT in self.problems:
            raise self.problems[COMMIT]
        self._begin_ns = time.time_ns()
        if not self._collected:
            self.collect()
        self._retire_left()
        # Through links what is somebody else's would be written. And what is not known to be made
        # durable by a backup that was valid cannot be made so later: a sync that has failed in a
        # process that is dead by now is not told of again.
        if blueprint.records != self._spare_of or self._files.has_links(self._spare):
            self._remove_backup(self._spare)
            self._spare = self._name_spare()
            self._make_spare(blueprint)
        return self._spare

    def take_written(self, plan: LayoutPlan, numbers: range) -> Written | None:
        """Returns what some shards in the spare directory hold; None if that is not known.

        To be called before anything is written there: afterwards it is known no more, until it is
        told to `seal`. Known is only what was made durable under the same plan by this object, and
        by a save that did not fail: an old piece must never be taken for a new one.
        """
        written = self._written.pop(self._spare, None)
        if written is None or written.plan is not plan:
            return None
        shards = (f"{self._spare}/{orbax.shard_path(number)}" for number in numbers)
        is_whole = all(self._files.size_bytes(shard) == plan.shard_bytes for shard in shards)
        return written if is_whole else None

    def seal(
        self,
        blueprint: Blueprint,
        step: int,
        training: bytes,
        digests: tuple[int, ...],
        contents: Contents | None = None,
        files: tuple[FileRecord, ...] = (),
    ) -> BackupRecord:
        """Completes the spare directory and gives it its final name, durably.

        Args:
            blueprint: The one that `begin` was called with.
            step: Global step of the save.
            training: Contents of `training.json`.
            digests: What `BackupRecord.shard_digests` describes.
            contents: What the shards hold that this process wrote; None if that is not known.
            files: What others have written beside their shards.
        """
        metadata = orbax.checkpoint_metadata(blueprint.items, self._begin_ns, time.time_ns())
        changing = {TRAINING_PATH: training, orbax.METADATA_PATH: metadata}
        self.complete(changing)
        changed = (FileRecord.of(path, data) for path, data in changing.items())
        record = BackupRecord(
            step=step,
            directory=self._spare,
            nonce=self.make_nonce(step),
            files=(*sorted(blueprint.records, key=lambda file: file.path), *changed, *files),
            shard_bytes=blueprint.plan.shard_bytes,
            shard_digests=digests,
        )
        record = self.name(record)
        if contents is not None:
            self._written[record.directory] = Written(blueprint.plan, contents, record.nonce)
        return record

    def complete(self, changing: Mapping[str, bytes]) -> None:
        """Writes the files that are written last into the spare directory, durably."""
        for path, data in changing.items():
            self._files.write(f"{self._spare}/{path}", data)
        # Without these a power cut can lose the entries of new shards and of these files.
        self._files.sync_directory(f"{self._spare}/{orbax.ARENA_PATH}/c")
        self._files.sync_directory(self._spare)

    def name(self, record: BackupRecord) -> BackupRecord:
        """Gives the spare directory, which is complete, its final name, durably."""
        named = dataclasses.replace(record, directory=str(record.step))
        self._files.rename(self._spare, named.directory)
        self._spare_of = frozenset()
        return named

    def publish(self, record: BackupRecord) -> None:
        """Makes a sealed backup the valid one; on return it is committed, durably."""
        older = self.records
        self._set_marker(COMMIT, record)
        self.committed = record
        try:
            self._retire_all_but(self._retention.choose(older), older)
        except OSError as e:
            # The new backup is committed all the same. What could not be put away is unreferenced:
            # the next `begin` tries again, or fails.
            _logger.warning("%s: could not retire an old backup: %s", self._files.root, e)
            self._collected = False

    def mark_ended(self) -> None:
        """Notes with the newest backup that its training has come to its end."""
        if self.committed is not None and not self.committed.ended:
            ended = dataclasses.replace(self.committed, ended=True)
            self._set_marker(COMMIT, ended)
            self.committed = ended

    def _retire_all_but(
        self, kept: tuple[BackupRecord, ...], older: tuple[BackupRecord, ...]
    ) -> None:
        if kept != self.kept:
            # After COMMIT, so that at no instant fewer backups are valid than are to be.
            self._set_marker(PREVIOUS, *kept)
            self.kept = kept
        for record in older:
            if record not in kept:
                self._retire(record)

    def record_of(self, step: int) -> BackupRecord | None:
        """Returns the backup of a step that is there and whole, for threads other than the keeper.

        None if there is none; or for a moment, while the keeper retires it.
        """
        some = (*self.records, *self._left)
        return next((record for record in some if record.step == step), None)

    def forget(self) -> None:
        """Gives up the backups that there are, for a newer one elsewhere, with the next `begin`."""
        self.committed, self.kept = None, ()
        self.problems.clear()
        self._collected = False

    def abandon(self) -> None:
        """Gives up a save that failed, so that none of its files is used again.

        After a failed sync the kernel may call pages clean that never reached the disk:
        the same file cannot be trusted even if a later sync succeeds.
        """
        self._written.clear()
        self._collected = False  # if it cannot be removed now, the next `begin` does it
        if self._files.exists(self._spare):
            self._remove_backup(self._spare)

    def delete_all(self) -> None:
        """Removes every backup, markers first, and nothing that stepsave did not write."""
        # The newest is the last to go: a crash in between must not have an older one restored.
        for name in (PREVIOUS, COMMIT):
            self._set_marker(name)
        self.committed, self.kept = None, ()
        self.problems.clear()
        for name in self._files.list():
            if is_spare(name) or name.isdigit():
                self._remove_backup(name)
        for name in TEMPORARY_NAMES:
            self._files.remove(name)
        self._spare_of = frozenset()
        self._left.clear()
        self._written.clear()

    def _retire(self, record: BackupRecord) -> None:
        if self.is_read(record.directory):
            self._left.append(record)
            return
        if self._files.exists(self._spare):
            self._remove_backup(record.directory)
            return
        written = self._written.pop(record.directory, None)
        self._spare = self._name_spare()
        self._files.rename(record.directory, self._spare)
        self._spare_of = frozenset(file for file in record.files if not self.is_changing(file.path))
        if written is not None:
            self._written[self._spare] = written

    def _retire_left(self) -> None:
        """Takes in what was still being read when it was retired, and is not any more."""
        left, self._left = self._left, []
        for record in left:
            self._retire(record)

    def _set_marker(self, name: str, *records: BackupRecord) -> None:
        if records:
            self._files.replace(name, encode_marker(*records))
            return
        self._files.remove(name)
        # Without it the marker can come back after its backup was removed.
        self._files.sync_directory()

    def collect(self) -> None:
        """Removes what earlier runs left: unreferenced backups and temporary files."""
        self._spare_of = frozenset()
        self._written.clear()
        # A killed process may have replaced a marker and not synced that. Without it a power cut
        # can bring the old one back after the backup that it names was retired.
        self._files.sync_directory()
        # They differ after `fall_back`, and after a publish that failed half way. A marker must not
        # name what is touched; COMMIT first, so that at each instant one names what can be read.
        newest = () if self.committed is None else (self.committed,)
        for name, records in ((COMMIT, newest), (PREVIOUS, self.kept)):
            if self.on_disk(name) != records:
                self._set_marker(name, *records)
                self.problems.pop(name, None)
        for name in TEMPORARY_NAMES:
            self._files.remove(name)
        kept = self._names() | {record.directory for record in self._left}
        for name in self._files.list():
            if is_spare(name):
                self._remove_backup(name)
            elif name.isdigit() and name not in kept and not self.is_read(name):
                _logger.debug("%s: removing unreferenced backup %s", self._files.root, name)
                self._remove_backup(self._spare)
                if self._files.exists(self._spare):  # with what is not ours in it
                    self._remove_backup(name)
                    continue
                # Renamed first: a half-removed directory must not look like a backup. What is not
                # ours in it goes along with the next save.
                self._files.rename(name, self._spare)
                self._remove_backup(self._spare)
        self._collected = True

    def _name_spare(self) -> str:
        return f"{SPARE}-{os.urandom(4).hex()}" if self._is_shared else SPARE

    def _names(self) -> set[str]:
        """Names of the directories that are valid backups."""
        return {record.directory for record in self.records}

    def _make_spare(self, blueprint: Blueprint) -> None:
        self._files.make_directory(self._spare)
        for path in (f"{orbax.ARENA_PATH}/c", *map(os.path.dirname, blueprint.files)):
            self._files.make_directory(f"{self._spare}/{path}")
        for path, data in blueprint.files.items():
            self._files.write(f"{self._spare}/{path}", data)
        # Without it a power cut can lose directories whose files are durable. The entry of this one
        # becomes durable when it gets its final name.
        self._files.sync_tree(self._spare)
        self._spare_of = blueprint.records

    def _remove_backup(self, name: str) -> None:
        """Removes a backup directory: the files that stepsave writes, nothing else."""
        self._written.pop(name, None)
        if not self._files.exists(name):
            return
        if left := remove_known(self._files, name):
            _logger.warning(
                "%s: kept %d file(s) that stepsave did not write, %s among them.",
                self._files.path(name),
                len(left),
                left[0],
            )
