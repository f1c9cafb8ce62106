"""What lies in a place beside valid backups, and why; and who uses it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from stepsave.cli.places import disks_of, valid_backups
from stepsave.engine.known_files import COMMIT, Kind, kind_of
from stepsave.engine.markers import Markers
from stepsave.format.marker import RUN_NAME
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.store.lock import LOCK_NAME, find_holder
from stepsave.store.places import Store

__all__ = ("find_holding", "find_others")

Document = dict[str, Any]

_DEBRIS = "debris"
_TEXTS = {
    "lock": "nobody holds it",
    "spare": "not valid: the next save replaces it",
    "temporary": "of a commit, under way or interrupted",
    _DEBRIS: "not valid: of a save, under way or interrupted",
    "junk": "of the file system or a desktop: left where it is",
    "foreign": "not stepsave's: to train here, move it away",
    "marker": "proves nothing",
}
_FOREIGN_IN_BUCKET = "not stepsave's: left where it is"
_OF_RUN = re.compile(rf"{RUN_NAME}/\d+", re.ASCII)


def find_holding(store: Store, markers: Markers) -> Document | None:
    """Returns who may save in a place now; None if nobody does, or that is not known.

    Of a bucket, that is who was the last to save: a marker does not tell whether he lives.
    """
    claim = markers.claim
    if claim is not None:
        owner = claim.owner
        return {"pid": owner.pid, "host": owner.host, "run": owner.run, "is_certain": False}
    if isinstance(store, BucketStore) or store.size_bytes(LOCK_NAME) is None:
        return None
    try:
        pid = find_holder(store.root)
    except OSError:  # a lock that we may not read
        return None
    return None if pid is None else {"pid": pid, "host": None, "run": None, "is_certain": True}


def find_others(store: Store, markers: Markers) -> list[Document]:
    """Returns what is no part of a valid backup."""
    if isinstance(store, BucketStore):
        return list(_in_bucket(store, markers))
    return list(_in_directory(store, markers))


def _in_directory(store: LocalStore, markers: Markers) -> Iterator[Document]:
    valid = {record.directory.partition("/")[0] for record in valid_backups(markers)}
    disks = {disk.root.name for disk in disks_of(store)}
    holder = find_holding(store, markers)
    for name in store.list():
        if name in valid | disks:
            continue
        # A file that this process holds itself must not even be opened: see `DirectoryLock`.
        is_held = name == LOCK_NAME and holder is not None
        found = Kind.LOCK if is_held else kind_of(store, name)
        kind = {Kind.BACKUP: _DEBRIS}.get(found, found.value)
        if found is Kind.FOREIGN and markers.claim is not None and re.fullmatch(RUN_NAME, name):
            kind = _DEBRIS  # in a copy of a bucket
        if found is Kind.GONE or (found is Kind.MARKER and name not in markers.problems):
            continue
        text = _TEXTS[kind]
        if is_held and holder is not None:
            pid = holder["pid"]
            text = f"held by process {pid}" if pid else "held by a process on another machine"
        size_bytes = None
        if found is not Kind.FOREIGN or kind == _DEBRIS or not store.is_directory(name):
            size_bytes = _size_bytes(store.root / name)  # else it could be anything, a home say
        yield {"name": name, "kind": kind, "bytes": size_bytes, "text": text}


def _size_bytes(path: Path) -> int:
    """Size of a file, or of all files below a directory; what goes meanwhile does not count."""
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files = [Path(directory, name) for directory, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        with suppress(FileNotFoundError):  # a training that saves there renames and removes
            total += os.lstat(file).st_size
    return total


def _in_bucket(store: BucketStore, markers: Markers) -> Iterator[Document]:
    valid = {record.directory for record in valid_backups(markers)}
    counts: dict[str, int] = {}
    for path in store.list(""):
        folder = "/".join(path.split("/")[:2])
        name = folder if _OF_RUN.fullmatch(folder) else path.partition("/")[0]
        if name not in valid:
            counts[name] = counts.get(name, 0) + 1
    for name, count in sorted(counts.items()):
        if name == COMMIT and name not in markers.problems:
            continue
        is_ours = name == COMMIT or _OF_RUN.fullmatch(name)
        kind = "marker" if name == COMMIT else _DEBRIS if is_ours else "foreign"
        text = _TEXTS[kind] if is_ours else _FOREIGN_IN_BUCKET
        number = "1 object" if count == 1 else f"{count} objects"
        yield {"name": name, "kind": kind, "bytes": None, "text": f"{text}, {number}"}
