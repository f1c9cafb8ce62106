"""What in a backup directory is stepsave's: nothing else is ever touched."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable

from stepsave.errors import BackupDirectoryError
from stepsave.format import orbax
from stepsave.format.holding import HOLDING_PATH
from stepsave.store.local import PROBE_NAME, TEMPORARY_SUFFIX, LocalStore
from stepsave.store.lock import LOCK_LIMIT_BYTES, LOCK_NAME

__all__ = (
    "COMMIT",
    "PREVIOUS",
    "SPARE",
    "TEMPORARY_NAMES",
    "TRAINING_PATH",
    "Kind",
    "is_spare",
    "is_training",
    "kind_of",
    "refuse_foreign",
    "remove_known",
    "training_path",
    "without_junk",
)

COMMIT = "COMMIT"
PREVIOUS = "PREVIOUS"
SPARE = "spare"
"""The directory that is not valid: retired, or being written. Neither digits, which stock
readers take for a step, nor Orbax's temporary suffix, which its managers delete. Where several
processes write, `-` and a random number follow."""

_SPARE = re.compile(SPARE + r"(-[0-9a-f]{8})?")

TRAINING_PATH = "training.json"
_TRAINING = re.compile(r"training(\.\d+)?\.json")
TEMPORARY_NAMES = (COMMIT + TEMPORARY_SUFFIX, PREVIOUS + TEMPORARY_SUFFIX, PROBE_NAME)

_JUNK = re.compile(
    r"lost\+found|\.snapshots?|\.DS_Store|Thumbs\.db|desktop\.ini|\.directory"
    r"|\.ipynb_checkpoints|\.Trash-\d+|\.nfs.*|\.fuse_hidden.*"
)
"""What file systems, desktops and notebooks put into any directory. Neither ours nor foreign: it
is passed over, and left where it is."""

# A shard, or what a killed tensorstore leaves of one: a file that was not yet renamed.
_SHARD = re.compile(r"\d+(_[0-9a-f]+)?(\.__lock)?")
# Nobody syncs it: a power cut can leave zeros in it, or the end of an older one behind it.
_LOCK = re.compile(rb"(pid \d+\n[0-9a-f\n]*)?\0*")
_KNOWN_DIRECTORIES = {"model_config", "pytree"}
_LOWER_DIRECTORIES = {"array_metadatas", "d", "c"}
_KNOWN_FILES = {
    "_CHECKPOINT_METADATA",
    "_METADATA",
    "_sharding",
    "_strings.json",
    "commit_success.txt",
    HOLDING_PATH,
    "index",
    "layout.json",
    "manifest.ocdbt",
    "process_0",
    "zarr.json",
}


class Kind(enum.Enum):
    """What something in a backup directory is."""

    MARKER = "marker"
    TEMPORARY = "temporary"
    """Of a marker that was being written, or of a probe."""
    LOCK = "lock"
    SPARE = "spare"
    BACKUP = "backup"
    """Complete or not: markers say which are valid."""
    JUNK = "junk"
    GONE = "gone"
    """It was there a moment ago."""
    FOREIGN = "foreign"


def is_spare(name: str) -> bool:
    """Whether that is the name of a directory that is not valid."""
    return _SPARE.fullmatch(name) is not None


def training_path(rank: int) -> str:
    """Where a process says what it knows of the training, if that is not what process 0 does."""
    return TRAINING_PATH if rank == 0 else f"training.{rank}.json"


def is_training(path: str) -> bool:
    """Whether a file of a backup says what a process knows of the training."""
    return _TRAINING.fullmatch(path) is not None


def _is_known(name: str) -> bool:
    return name in _KNOWN_FILES or is_training(name)


def refuse_foreign(store: LocalStore, committed: Collection[str]) -> None:
    """Refuses a directory with anything in it that stepsave does not write there.

    Args:
        store: The directory. Nothing in it is changed.
        committed: Names of the backups that markers vouch for.

    Raises:
        BackupDirectoryError: Naming what was found.
    """
    for name in store.list():
        if name in committed or kind_of(store, name) is not Kind.FOREIGN:
            continue
        raise BackupDirectoryError(
            f"{store.root}: expected a directory of stepsave's own, found {name!r} in it. "
            "Choose another `backup_dir`, or move that away. Nothing was changed."
        )


def without_junk(paths: Iterable[str]) -> list[str]:
    """Returns the paths in which no name is junk."""
    return [path for path in paths if not any(map(_JUNK.fullmatch, path.split("/")))]


def kind_of(store: LocalStore, name: str) -> Kind:
    """Returns what something in a backup directory is.

    Other tools name directories by digits and put Orbax's files in them; only `layout.json`
    tells a backup of ours. It is removed last, so one that was being removed when the
    process died has it too, or no file at all. `spare` is nobody else's name, and may also
    hold any part of a backup.
    """
    if _JUNK.fullmatch(name):
        return Kind.JUNK
    if name in (COMMIT, PREVIOUS):
        return Kind.MARKER
    if name in TEMPORARY_NAMES:
        return Kind.TEMPORARY
    is_ours, kind = False, Kind.BACKUP
    if name == LOCK_NAME:
        kind = Kind.LOCK
        try:
            is_ours = _LOCK.fullmatch(store.read(name, LOCK_LIMIT_BYTES)) is not None
        except FileNotFoundError:
            return Kind.GONE
    elif not store.is_directory(name):
        kind = Kind.GONE  # this moment, by the process that owns it
        is_ours = not store.exists(name)
    elif is_spare(name):
        kind, found = Kind.SPARE, without_junk(store.list(name))
        # What somebody put into a backup is in it when it is retired.
        is_ours = orbax.LAYOUT_PATH in found or all(
            _is_known(one) or one in _KNOWN_DIRECTORIES for one in found
        )
    elif name.isdecimal():
        found = without_junk(store.list(name))
        # What is left of ours where there was junk in it: directories.
        is_left = set(found) <= _KNOWN_DIRECTORIES and not without_junk(store.walk(name))
        is_ours = is_left or orbax.LAYOUT_PATH in found
    return kind if is_ours else Kind.FOREIGN


def remove_known(store: LocalStore, directory: str) -> list[str]:
    """Removes known files below a directory, then empty directories; returns what is left."""
    left: list[str] = []
    for name in sorted(store.list(directory), key=lambda name: name == orbax.LAYOUT_PATH):
        path = f"{directory}/{name}"
        if name == orbax.LAYOUT_PATH:
            # Without it a power cut can bring the other files back, and leave what nobody knows as
            # a backup of ours.
            store.sync_directory(directory)
        if _JUNK.fullmatch(name):
            left.append(path)
        elif store.is_directory(path):
            left += remove_known(store, path)
        elif _is_known(name) or (directory.endswith("/d/c") and _SHARD.fullmatch(name)):
            store.remove(path)
        elif name in _KNOWN_DIRECTORIES | _LOWER_DIRECTORIES and store.size_bytes(path) is None:
            store.remove(path)  # a link in place of a directory; what it leads to stays
        else:
            left.append(path)
    if not left:
        store.remove_empty_directory(directory)
    return left
