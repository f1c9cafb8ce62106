"""What the small files of a backup say, and which of them are damaged: all, not only the first."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from stepsave.engine.attempts import ATTEMPTS, ReplacedError, read_lasting
from stepsave.engine.known_files import COMMIT, TRAINING_PATH
from stepsave.engine.markers import Markers
from stepsave.errors import (
    BackupDirectoryError,
    BucketError,
    CorruptBackupError,
    FormatVersionError,
)
from stepsave.format import orbax
from stepsave.format.checksum import crc32c
from stepsave.format.holding import HOLDING_PATH, Holding, decode_holding
from stepsave.format.layout import decode_layout
from stepsave.format.records import (
    DTYPES,
    BackupRecord,
    ChunkSpec,
    FileRecord,
    LayoutPlan,
    LeafSpec,
)
from stepsave.format.tree import decode_training
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = (
    "READ_THREADS",
    "Damage",
    "Examined",
    "check_shard_sizes",
    "examine",
    "leaves_of",
    "marker_damages",
    "noting",
    "settle",
)

T = TypeVar("T")

READ_THREADS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as the marker of a backup says, or a marker that proves nothing.

    Attributes:
        path: The file, in the place where the backup is.
        text: What was expected of it, and found.
        leaves: Paths of the arrays that are lost by it.
    """

    path: str
    text: str
    leaves: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Examined:
    """A backup that a marker vouches for, as far as its small files are whole.

    Attributes:
        record: What the marker says.
        files: Those files, by path in the backup.
        plan: Its layout; None if that is damaged.
        holding: Which part of a backup of several processes it is, if it is one.
        training: What `training.json` says; empty if that is damaged.
        saved_at_s: When it was saved, in seconds since the epoch; None if that is damaged.
        damages: What is damaged.
    """

    record: BackupRecord
    files: dict[str, bytes]
    plan: LayoutPlan | None
    holding: Holding | None
    training: dict[str, Any]
    saved_at_s: float | None
    damages: tuple[Damage, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the training has said of itself."""
        return self.training.get("metadata", {})


def settle(look: Callable[..., tuple[T, bool]], *stores: Store) -> T:
    """Looks at the backups of places; again, if that has met damage and they were replaced.

    Args:
        look: Called with the markers of each. Returns what it has found, and whether anything was
            damaged; or raises.
        stores: The places.

    Raises:
        BackupDirectoryError: If they were replaced each time.
        FormatVersionError, OSError: If a marker cannot be read, though it may be whole.
    """
    try:
        return read_lasting(
            lambda: [_read_markers(store).records for store in stores],
            lambda _, __: look(*map(_read_markers, stores)),
        )
    except ReplacedError as e:
        raise BackupDirectoryError(
            f"{stores[0].root}: the backups were replaced {ATTEMPTS} times while they were being "
            "read. Look again when saves are made less often, or at a copy of the directory."
        ) from e.__cause__


def _read_markers(store: Store) -> Markers:
    markers = Markers(store)
    markers.read_markers()
    for problem in markers.problems.values():
        if isinstance(problem, FormatVersionError) or not isinstance(problem, CorruptBackupError):
            raise problem
    return markers


@contextlib.contextmanager
def noting(
    damages: list[Damage], store: Store, path: str, leaves: tuple[tuple[str, ...], ...] = ()
) -> Generator[None]:
    """Takes down what shows that a file is damaged; what makes it unreadable for us passes.

    Raises:
        BucketError, PermissionError, FormatVersionError: If it may be whole.
    """
    try:
        yield
    except (BucketError, PermissionError, FormatVersionError):
        raise
    except OSError as e:
        damages.append(Damage(path, e.strerror or str(e), leaves))
    except CorruptBackupError as e:
        # Without the advice at its end: there may be many.
        text = str(e.args[0]).removeprefix(f"{store.path(path)}: ")
        damages.append(Damage(path, text, leaves))


def examine(store: Store, record: BackupRecord, crew: Crew) -> Examined:
    """Reads and checks all files of a backup but its shards.

    Raises:
        BucketError, PermissionError, FormatVersionError: If one cannot be read, though it may be
            whole.
    """
    damages: list[Damage] = []
    files: dict[str, bytes] = {}

    def read(file: FileRecord) -> None:
        path = f"{record.directory}/{file.path}"
        with noting(damages, store, path):
            files[file.path] = _read_proved(store, path, file)

    crew.share(record.files, read, helpers=READ_THREADS - 1)

    def decode(path: str, decoder: Callable[[bytes, str], T]) -> T | None:
        place = f"{record.directory}/{path}"
        with noting(damages, store, place):
            if path in files:
                return decoder(files[path], str(store.path(place)))
            if all(file.path != path for file in record.files):
                raise CorruptBackupError("expected it to be in the marker, where it is not.")
        return None

    has_holding = any(file.path == HOLDING_PATH for file in record.files)
    holding = decode(HOLDING_PATH, decode_holding) if has_holding else None
    plan = decode(orbax.LAYOUT_PATH, lambda data, source: _decode_layout(data, source, record))
    leaves = holding.plan.leaves if holding else None if plan is None else plan.leaves
    training = decode(TRAINING_PATH, lambda data, source: _decode_training(data, source, leaves))
    saved_at_s = decode(orbax.METADATA_PATH, lambda data, _: _decode_time(data))
    damages.sort(key=lambda damage: damage.path)
    return Examined(record, files, plan, holding, training or {}, saved_at_s, tuple(damages))


def _read_proved(store: Store, path: str, file: FileRecord) -> bytes:
    data = store.read(path, file.size_bytes)
    if len(data) != file.size_bytes:
        raise CorruptBackupError(f"expected {file.size_bytes} bytes, found {len(data)}.")
    found = crc32c(data)
    if found != file.crc32c:
        raise CorruptBackupError(f"expected CRC-32C {file.crc32c:08x}, found {found:08x}.")
    return data


def _decode_layout(data: bytes, source: str, record: BackupRecord) -> LayoutPlan:
    plan = decode_layout(data, source)
    described = plan.shard_bytes, plan.shard_count
    named = record.shard_bytes, len(record.shard_digests)
    if described != named:
        raise CorruptBackupError(
            f"expected {named[1]} shards of {named[0]} bytes, as the marker says; found "
            f"{described[1]} of {described[0]}."
        )
    return plan


def _decode_training(data: bytes, source: str, leaves: Sequence[LeafSpec] | None) -> dict[str, Any]:
    if leaves is None:
        return decode_training(data, source, None)[0]
    empty = [np.broadcast_to(np.zeros((), DTYPES[leaf.dtype]), leaf.shape) for leaf in leaves]
    return decode_training(data, source, [leaf.path for leaf in leaves], empty)[0]


def _decode_time(data: bytes) -> float:
    try:
        return orbax.saved_at_s(data)
    except ValueError as e:
        raise CorruptBackupError(f"expected a time, found {e}.") from e


def check_shard_sizes(store: Store, examined: Examined, crew: Crew) -> list[Damage]:
    """Asks how large the shards are, and returns what is wrong with that. Reads none."""
    record, plan = examined.record, examined.plan
    damages: list[Damage] = []

    def check(number: int) -> None:
        path = f"{record.directory}/{orbax.shard_path(number)}"
        leaves = () if plan is None else leaves_of(plan, plan.shard_chunks[number])
        with noting(damages, store, path, leaves):
            store.check_sizes({path: record.shard_bytes})

    crew.share(range(len(record.shard_digests)), check, helpers=READ_THREADS - 1)
    return sorted(damages, key=lambda damage: damage.path)


def leaves_of(plan: LayoutPlan, chunks: Iterable[ChunkSpec]) -> tuple[tuple[str, ...], ...]:
    """Returns the paths of the arrays that chunks are of, each once."""
    return tuple(dict.fromkeys(plan.leaves[chunk.leaf].path for chunk in chunks))


def marker_damages(markers: Markers, store: Store) -> list[Damage]:
    """Returns what is wrong with the markers."""
    found: list[Damage] = []
    for name, problem in markers.problems.items():
        with noting(found, store, name):
            raise problem
    is_lost = markers.committed is None and bool(markers.kept)
    if is_lost and COMMIT not in markers.problems:
        found.append(Damage(COMMIT, "expected the marker of the newest backup, found none."))
    return found
