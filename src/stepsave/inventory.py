"""What in a backup directory is stepsave's: nothing else is ever touched."""

from __future__ import annotations

from stepsave import orbax
from stepsave.errors import BackupDirectoryError
from stepsave.store.local import PROBE_NAME, TEMPORARY_SUFFIX, LocalStore
from stepsave.store.lock import LOCK_NAME

__all__ = (
    "COMMIT",
    "PREVIOUS",
    "SPARE",
    "TEMPORARY_NAMES",
    "TRAINING_PATH",
    "refuse_foreign",
    "remove_known",
)

COMMIT = "COMMIT"
PREVIOUS = "PREVIOUS"
SPARE = "spare"
"""The directory that is not valid: retired, or being written. Neither digits, which stock
readers take for a step, nor Orbax's temporary suffix, which its managers delete."""

TRAINING_PATH = "training.json"
TEMPORARY_NAMES = (COMMIT + TEMPORARY_SUFFIX, PREVIOUS + TEMPORARY_SUFFIX, PROBE_NAME)

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


def refuse_foreign(store: LocalStore) -> None:
    """Refuses a directory with anything in it that stepsave does not write there.

    Raises:
        BackupDirectoryError: Naming what was found.
    """
    for name in store.list():
        if name in (COMMIT, PREVIOUS, LOCK_NAME, *TEMPORARY_NAMES):
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


def remove_known(store: LocalStore, directory: str) -> list[str]:
    """Removes known files below a directory, then empty directories; returns what is left."""
    left: list[str] = []
    for name in store.list(directory):
        path = f"{directory}/{name}"
        if store.is_directory(path):
            left += remove_known(store, path)
        elif name in _KNOWN_FILES or (name.isdecimal() and directory.endswith("/d/c")):
            store.remove(path)
        else:
            left.append(path)
    if not left:
        store.remove_empty_directory(directory)
    return left
