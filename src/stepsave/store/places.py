"""Which kind of store is at a place."""

from __future__ import annotations

import os
from collections.abc import Mapping

from stepsave.store.addresses import Name, address_of
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore

__all__ = ("Store", "Target", "name_of", "open_store")

Store = LocalStore | BucketStore

Target = Name | Store
"""Where backups are to lie: what names a place, or, for tests, a store that is open already."""


def name_of(target: Target) -> str:
    """Returns the path as it was given, or the URL.

    Raises:
        BackupDirectoryError: If it cannot be used.
    """
    if isinstance(target, LocalStore | BucketStore):
        return str(target.root)
    address = address_of(target)
    if address is not None:
        return address.url
    assert not isinstance(target, Mapping)
    return os.fspath(target)


def open_store(target: Target) -> Store:
    """Returns the store at a place, or the very one that is given.

    Touches nothing, and imports no driver yet.

    Raises:
        ValueError: If nothing is named.
        BackupDirectoryError: If it cannot be used, or its configuration is incomplete.
    """
    if isinstance(target, LocalStore | BucketStore):
        return target
    address = address_of(target)
    if address is not None:
        return BucketStore(address)
    assert not isinstance(target, Mapping)
    return LocalStore(os.fspath(target))
