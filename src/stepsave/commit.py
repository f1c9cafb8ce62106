"""The commit protocol: which backup is valid, at every instant.

A marker file names the valid backup and proves itself and the backup by content: its own
CRC-32C, and size and CRC-32C of every file that it vouches for. Never by existence: after a
power cut ext4 can show a file that was renamed into place, but empty.

    1. begin    the retired directory, `spare`, is made ready (or a new one made)
    2. shards   written into it and synced, by `stepsave.writer`
    3. seal     the remaining files are written and synced; `spare` is renamed to its step
    4. publish  the marker `COMMIT` is replaced atomically: this is the commit point
    5. retire   the backup that was valid before becomes `spare`

With `double_checkpoint` a second marker, `PREVIOUS`, names the backup before, and the one
before that is retired. A crash between any two operations leaves the old backup valid or
the new one; what it leaves lying about is taken in by the next `begin`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping
from typing import Any, cast

from crc32c import crc32c

from stepsave import orbax
from stepsave.errors import BackupDirectoryError, CorruptBackupError, FormatVersionError
from stepsave.spec import FORMAT_VERSION, BackupRecord, FileRecord, LayoutPlan
from stepsave.store.local import PROBE_NAME, TEMPORARY_SUFFIX, LocalStore
from stepsave.store.lock import LOCK_NAME

__all__ = (
    "COMMIT",
    "PREVIOUS",
    "SPARE",
    "TRAINING_PATH",
    "Blueprint",
    "CommitProtocol",
    "Problem",
)

_logger = logging.getLogger("stepsave")

COMMIT = "COMMIT"
PREVIOUS = "PREVIOUS"
SPARE = "spare"
TRAINING_PATH = "training.json"
_CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
_MAGIC = "stepsave-commit"
_MARKER_LIMIT_BYTES = 64 << 20
_TEMPORARY = (COMMIT + TEMPORARY_SUFFIX, PREVIOUS + TEMPORARY_SUFFIX, PROBE_NAME)

Problem = CorruptBackupError | OSError
"""Why a marker cannot be read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Blueprint:
    """What all backups of one layout have in common.

    Attributes:
        plan: The layout.
        files: Constant files by path: those of the layout, and those of the items.
        items: Names of the Orbax checkpointables beside `pytree`.
        records: What proves the constant files.
    """

    plan: LayoutPlan
    files: Mapping[str, bytes]
    items: tuple[str, ...]
    records: frozenset[FileRecord]

    @classmethod
    def compile(cls, plan: LayoutPlan, items: Mapping[str, Mapping[str, str]]) -> Blueprint:
        """Makes the constant files of a layout.

        Args:
            plan: The layout.
            items: Further checkpointables: dicts of strings by name.
        """
        files = orbax.constant_files(plan)
        for name, strings in items.items():
            files |= orbax.json_item(name, strings)
        records = frozenset(_record_file(path, data) for path, data in files.items())
        return cls(plan, files, tuple(items), records)


class CommitProtocol:
    """The backups in one directory. Used by one thread at a time."""

    def __init__(self, store: LocalStore, *, double_checkpoint: bool) -> None:
        """Looks at the directory and refuses it if something in it is not stepsave's.

        Raises:
            BackupDirectoryError: If the directory holds something foreign.
        """
        self._store = store
        self._double = double_checkpoint
        self._spare_of: frozenset[FileRecord] = frozenset()  # what `spare` is known to hold
        self._collected = False
        self._begin_ns = 0
        _refuse_foreign(store)
        self.committed: BackupRecord | None = None
        self.previous: BackupRecord | None = None
        self.problems: dict[str, Problem] = {}
        self.read_markers()

    def read_markers(self) -> None:
        """Takes from disk which backups are valid; what cannot be read is in `problems`."""
        self.problems.clear()
        self.committed = self._read_marker(COMMIT)
        self.previous = self._read_marker(PREVIOUS)

    def _read_marker(self, name: str) -> BackupRecord | None:
        try:
            encoded = self._store.read(name, _MARKER_LIMIT_BYTES)
            return decode_marker(encoded, str(self._store.path(name)))
        except FileNotFoundError:
            return None
        except (CorruptBackupError, OSError) as e:
            self.problems[name] = e
            return None

    def fall_back(self) -> None:
        """Declares the newest backup unreadable: the previous one is the newest now.

        Takes effect on disk with the next `begin`, when training has gone on from the
        previous backup; until then nothing is touched, in case the fault passes.
        """
        assert self.previous is not None
        self.committed, self.previous = self.previous, None
        self.problems.pop(COMMIT, None)
        self._collected = False

    def begin(self, blueprint: Blueprint) -> str:
        """Makes a directory ready to receive the shards of a new save; returns its name.

        Raises:
            CorruptBackupError: If a marker cannot be read, and so nobody knows which of
                the directories is valid.
            OSError: If the file system refuses.
        """
        if COMMIT in self.problems:
            raise self.problems[COMMIT]
        self._begin_ns = time.time_ns()
        if not self._collected:
            self._collect()
        if not blueprint.records <= self._spare_of:
            if not self._spare_fits(blueprint):
                self._remove_backup(SPARE)
                self._make_spare(blueprint)
            self._spare_of = blueprint.records
        return SPARE

    def seal(
        self, blueprint: Blueprint, step: int, training: bytes, digests: tuple[int, ...]
    ) -> BackupRecord:
        """Completes the spare directory and gives it its final name, durably.

        Args:
            blueprint: The one that `begin` was called with.
            step: Global step of the save.
            training: Contents of `training.json`.
            digests: What `BackupRecord.shard_digests` describes.
        """
        metadata = orbax.checkpoint_metadata(blueprint.items, self._begin_ns, time.time_ns())
        changing = {TRAINING_PATH: training, _CHECKPOINT_METADATA: metadata}
        for path, data in changing.items():
            self._store.write(f"{SPARE}/{path}", data)
        # Without it a power cut can lose the entries of the files just written.
        self._store.sync_directory(SPARE)
        directory = str(step)
        self._store.rename(SPARE, directory)
        self._spare_of = frozenset()
        changed = (_record_file(path, data) for path, data in changing.items())
        return BackupRecord(
            step=step,
            directory=directory,
            nonce=os.urandom(16).hex(),
            files=(*sorted(blueprint.records, key=lambda file: file.path), *changed),
            shard_bytes=blueprint.plan.shard_bytes,
            shard_digests=digests,
        )

    def publish(self, record: BackupRecord) -> None:
        """Makes a sealed backup the valid one; on return it is committed, durably."""
        before = self.committed
        self._store.replace(COMMIT, encode_marker(record))
        self.committed = record
        try:
            self._retire_after(before)
        except OSError as e:
            # The new backup is committed all the same, so the save has not failed. What
            # could not be put away is unreferenced; the next `begin` tries again, and
            # fails if it cannot either.
            _logger.warning("%s: could not retire an old backup: %s", self._store.root, e)
            self._spare_of, self._collected = frozenset(), False

    def _retire_after(self, before: BackupRecord | None) -> None:
        if self._double and before is not None:
            # After COMMIT, so that at no instant fewer than two backups are valid.
            self._store.replace(PREVIOUS, encode_marker(before))
            oldest, self.previous = self.previous, before
            self._retire(oldest)
            return
        if self.previous is not None:  # of an earlier run with `double_checkpoint`
            oldest = self.previous
            self._drop_previous_marker()
            self._remove_backup(oldest.directory)
        self._retire(before)

    def abandon(self) -> None:
        """Gives up a save that failed, so that none of its files is used again.

        After a failed sync the kernel may call pages clean that never reached the disk:
        the same file cannot be trusted even if a later sync succeeds.
        """
        self._spare_of = frozenset()
        self._collected = False
        if self._store.exists(SPARE):
            self._remove_backup(SPARE)

    def delete_all(self) -> None:
        """Removes every backup, markers first, and nothing that stepsave did not write."""
        for name in (COMMIT, PREVIOUS):
            self._store.remove(name)
        # Without it a power cut can bring a marker back whose backup is gone.
        self._store.sync_directory()
        self.committed = self.previous = None
        self.problems.clear()
        for name in self._store.list():
            if name == SPARE or name.isdigit():
                self._remove_backup(name)
        for name in _TEMPORARY:
            self._store.remove(name)
        self._spare_of = frozenset()

    def _retire(self, record: BackupRecord | None) -> None:
        if record is None:
            return
        self._store.rename(record.directory, SPARE)
        self._spare_of = frozenset(record.files)

    def _drop_previous_marker(self) -> None:
        self._store.remove(PREVIOUS)
        # Without it the marker can come back after its backup was removed.
        self._store.sync_directory()
        self.previous = None

    def _collect(self) -> None:
        """Takes in what earlier runs left: unreferenced backups and temporary files."""
        if self._read_marker(COMMIT) != self.committed:
            # Either `fall_back` was called, or a publish failed half way. The marker must
            # stop naming a backup before anything of that backup is touched.
            self._drop_previous_marker()
            if self.committed is None:
                self._store.remove(COMMIT)
                self._store.sync_directory()
            else:
                self._store.replace(COMMIT, encode_marker(self.committed))
            self.problems.pop(COMMIT, None)
        for name in _TEMPORARY:
            self._store.remove(name)
        kept = {record.directory for record in (self.committed, self.previous) if record}
        for name in self._store.list():
            if name.isdigit() and name not in kept:
                _logger.debug("%s: taking in unreferenced backup %s", self._store.root, name)
                self._remove_backup(SPARE)
                # Renamed first: a half-removed directory must not look like a backup.
                self._store.rename(name, SPARE)
        self._collected = True

    def _make_spare(self, blueprint: Blueprint) -> None:
        self._store.make_directory(SPARE)
        for path in (f"{orbax.ARENA_PATH}/c", *map(os.path.dirname, blueprint.files)):
            self._store.make_directory(f"{SPARE}/{path}")
        for path, data in blueprint.files.items():
            self._store.write(f"{SPARE}/{path}", data)
        # Without these a power cut can lose directories whose files are durable.
        self._store.sync_tree(SPARE)
        self._store.sync_directory()

    def _spare_fits(self, blueprint: Blueprint) -> bool:
        """Whether `spare` has these constant files and no shard beyond the plan's count."""
        for path, data in blueprint.files.items():
            name = f"{SPARE}/{path}"
            if self._store.size_bytes(name) != len(data):
                return False
            if self._store.read(name, len(data)) != data:
                return False
        shards = {str(number) for number in range(blueprint.plan.shard_count)}
        return set(self._store.list(f"{SPARE}/{orbax.ARENA_PATH}/c")) <= shards

    def _remove_backup(self, name: str) -> None:
        """Removes a backup directory: the files that stepsave writes, nothing else."""
        if not self._store.exists(name):
            return
        left = _remove_known(self._store, name)
        if left:
            _logger.warning(
                "%s: kept %d file(s) that stepsave did not write, %s among them.",
                self._store.path(name),
                len(left),
                left[0],
            )


def encode_marker(record: BackupRecord) -> bytes:
    """Encodes a marker: a line that proves the JSON after it."""
    document = {
        "format": FORMAT_VERSION,
        "step": record.step,
        "directory": record.directory,
        "nonce": record.nonce,
        "files": [[file.path, file.size_bytes, file.crc32c] for file in record.files],
        "shard_bytes": record.shard_bytes,
        "shard_digests": list(record.shard_digests),
    }
    body = json.dumps(document, separators=(",", ":")).encode()
    return f"{_MAGIC} {FORMAT_VERSION} {crc32c(body):08x} {len(body)}\n".encode() + body


def decode_marker(encoded: bytes, source: str) -> BackupRecord:
    """Decodes a marker, trusting nothing but what its checksum proves.

    Raises:
        FormatVersionError: If a newer stepsave wrote it.
        CorruptBackupError: If it does not prove itself.
    """
    advice = (
        "Nothing was deleted. Restore the file from a copy, or move the backup directory away "
        "to start afresh."
    )
    line, _, body = encoded.partition(b"\n")
    words = line.decode("ascii", errors="replace").split()
    if len(words) != 4 or words[0] != _MAGIC:
        found = f"{len(encoded)} bytes that start with {encoded[:20]!r}"
        raise CorruptBackupError(f"{source}: expected a commit marker, found {found}. {advice}")
    if words[1] != str(FORMAT_VERSION):
        raise FormatVersionError(
            f"{source}: written in format {words[1]}, but this stepsave reads format "
            f"{FORMAT_VERSION}. Install a newer stepsave to restore this backup."
        )
    if words[3] != str(len(body)):
        raise CorruptBackupError(
            f"{source}: expected {words[3]} bytes after the first line, found {len(body)}. {advice}"
        )
    if words[2] != f"{crc32c(body):08x}":
        raise CorruptBackupError(
            f"{source}: expected CRC-32C {words[2]}, found {crc32c(body):08x}. {advice}"
        )
    try:
        return _record_of(json.loads(body))
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise CorruptBackupError(f"{source}: malformed commit marker: {e!r}. {advice}") from e


def _record_of(document: dict[str, Any]) -> BackupRecord:
    files = cast("list[tuple[str, int, int]]", document["files"])
    record = BackupRecord(
        step=int(document["step"]),
        directory=str(document["directory"]),
        nonce=str(document["nonce"]),
        files=tuple(FileRecord(str(path), int(size), int(crc)) for path, size, crc in files),
        shard_bytes=int(document["shard_bytes"]),
        shard_digests=tuple(int(digest) for digest in document["shard_digests"]),
    )
    if not record.directory.isdecimal() or record.directory != str(record.step):
        raise ValueError(f"directory {record.directory!r} is not that of step {record.step}")
    for file in record.files:
        parts = file.path.split("/")
        if not all(parts) or ".." in parts or "\0" in file.path or "\\" in file.path:
            raise ValueError(f"path {file.path!r} leads outside the backup")
    return record


def _refuse_foreign(store: LocalStore) -> None:
    """Refuses a directory with anything in it that stepsave does not write there.

    Raises:
        BackupDirectoryError: Naming what was found.
    """
    for name in store.list():
        if name in (COMMIT, PREVIOUS, LOCK_NAME, *_TEMPORARY):
            continue
        if name.startswith(".nfs"):  # a file removed while open, on NFS
            continue
        if (name == SPARE or name.isdigit()) and _is_ours(store, name):
            continue
        raise BackupDirectoryError(
            f"{store.root}: expected a directory of stepsave's own, found {name!r} in it. "
            "Choose another `backup_dir`, or move that away. Nothing was changed."
        )


def _is_ours(store: LocalStore, name: str) -> bool:
    if not store.is_directory(name):
        return False
    # A backup that was being made or removed when the process died may lack any file; then
    # it is ours if it holds nothing that we would not write.
    found = store.list(name)
    return orbax.LAYOUT_PATH in found or set(found) <= _KNOWN_ENTRIES


def _record_file(path: str, data: bytes) -> FileRecord:
    return FileRecord(path, len(data), crc32c(data))


_KNOWN_ENTRIES = {
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "layout.json",
    "model_config",
    "pytree",
    "training.json",
}
_KNOWN_FILES = {
    "_CHECKPOINT_METADATA",
    "_METADATA",
    "_sharding",
    "_strings.json",
    "commit_success.txt",
    "index",
    "layout.json",
    "manifest.ocdbt",
    "process_0",
    "training.json",
    "zarr.json",
}


def _remove_known(store: LocalStore, directory: str) -> list[str]:
    """Removes known files below a directory, then empty directories; returns what is left."""
    left: list[str] = []
    for name in store.list(directory):
        path = f"{directory}/{name}"
        if store.is_directory(path):
            left += _remove_known(store, path)
        elif name in _KNOWN_FILES or (name.isdecimal() and directory.endswith("/d/c")):
            store.remove(path)
        else:
            left.append(path)
    if not left:
        store.remove_empty_directory(directory)
    return left
