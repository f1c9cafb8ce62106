"""The places that are named on the command line, opened for reading."""

from __future__ import annotations

import os
import re

from stepsave.engine.markers import Markers
from stepsave.format.records import BackupRecord
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.store.places import Store, open_store

__all__ = ("disks_of", "open_place", "split_step", "valid_backups")

_DISK = re.compile(r"process-\d+")
_STEP = re.compile(r"(.+)@(\d+)")


def open_place(target: str) -> Store:
    """Returns what is there; writes nothing, and takes no lock.

    Raises:
        BackupDirectoryError, ValueError: If there is no such place.
    """
    store = open_store(target)
    store.check_directory()
    return store


def split_step(target: str) -> tuple[str, int | None]:
    """Takes `@STEP` off the end of a place; a directory that has that in its name stays whole."""
    match = _STEP.fullmatch(target)
    if match is None or os.path.lexists(target):
        return target, None
    return match[1], int(match[2])


def disks_of(store: Store) -> list[LocalStore]:
    """Returns what each of several processes keeps on a disk of this machine (`local_dir=`)."""
    if isinstance(store, BucketStore):
        return []
    names = filter(_DISK.fullmatch, store.list())
    numbered = sorted(names, key=lambda name: int(name.partition("-")[2]))
    return [LocalStore(store.root / name) for name in numbered if store.is_directory(name)]


def valid_backups(markers: Markers) -> list[BackupRecord]:
    """Returns the backups that markers vouch for, the newest first."""
    # Between the reading of two markers both may have been replaced, and name the same one.
    return list({record.nonce: record for record in markers.records}.values())
