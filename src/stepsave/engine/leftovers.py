"""What lies at a place and is no part of a valid backup, though stepsave wrote it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence

from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.commit import CommitProtocol
from stepsave.engine.known_files import TEMPORARY_NAMES, is_spare
from stepsave.errors import CorruptBackupError
from stepsave.format import orbax
from stepsave.format.layout import decode_layout
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.store.places import Store

__all__ = ("Leftover", "find_leftovers", "remove_leftovers")

_LIMIT_BYTES = 1 << 30  # of a file beside the shards
_SHARD = re.compile(re.escape(orbax.shard_path(0)).removesuffix("0") + r"\d+")


@dataclasses.dataclass(frozen=True, slots=True)
class Leftover:
    """Something that may be removed.

    Attributes:
        path: Where it is, relative to the place.
        used_bytes: What removing it frees; None if that cannot be told.
        reason: What it is.
    """

    path: str
    used_bytes: int | None
    reason: str


def find_leftovers(store: Store, protocol: CommitProtocol | BucketCommit) -> list[Leftover]:
    """Lists what is left over, as the markers were when the protocol read them.

    Raises:
        CorruptBackupError, OSError: If a marker cannot be read: then nobody knows what is valid.
    """
    for problem in protocol.problems.values():
        raise problem
    kept = {record.directory for record in protocol.records}
    if isinstance(store, LocalStore):
        return list(_in_directory(store, kept))
    assert isinstance(protocol, BucketCommit)
    return list(_in_bucket(store, protocol, kept))


def remove_leftovers(protocol: CommitProtocol | BucketCommit) -> None:
    """Removes them, for one who holds the place.

    Raises:
        CorruptBackupError, OSError: If a marker cannot be read, or the place fails.
    """
    for problem in protocol.problems.values():
        raise problem
    protocol.collect()
    if isinstance(protocol, CommitProtocol):
        protocol.abandon()  # the spare directory, which holds what was collected last


def _in_directory(store: LocalStore, kept: set[str]) -> Iterator[Leftover]:
    for name in store.list():
        if name in TEMPORARY_NAMES:
            reason = "a file that was being written when its process died"
        elif is_spare(name):
            reason = "the directory that the next save would write into again"
        elif name.isdigit() and name not in kept:
            reason = "a backup that no marker names: a save that did not end, or a retired one"
        else:
            continue
        yield Leftover(name, store.used_bytes(name), reason)


def _in_bucket(store: BucketStore, protocol: BucketCommit, kept: set[str]) -> Iterator[Leftover]:
    for directory, paths in protocol.list_backups().items():
        if directory not in kept:
            reason = "a backup that the marker does not name: a save that did not end"
            yield Leftover(directory, _size_bytes(store, directory, paths), reason)


def _size_bytes(store: BucketStore, directory: str, paths: Sequence[str]) -> int | None:
    """Size of all objects of a backup. A list of objects does not tell it: shards are of one size,
    and the rest is small enough to be read.
    """
    size_bytes = shard_count = 0
    shard_bytes = None
    for path in paths:
        below = path.removeprefix(f"{directory}/")
        if _SHARD.fullmatch(below):
            shard_count += 1
            continue
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            data = store.read(path, _LIMIT_BYTES)
            size_bytes += len(data)
            if below == orbax.LAYOUT_PATH:
                with contextlib.suppress(CorruptBackupError):
                    shard_bytes = decode_layout(data, str(store.path(path))).shard_bytes
    if shard_count and shard_bytes is None:
        return None
    return size_bytes + shard_count * (shard_bytes or 0)
