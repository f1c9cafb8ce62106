"""The nouns of stepsave: frozen records that cross module borders."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from stepsave.format.checksum import crc32c

__all__ = (
    "DTYPES",
    "Backup",
    "BackupRecord",
    "ChunkSpec",
    "FileRecord",
    "LayoutPlan",
    "LeafSpec",
    "SaveStats",
    "read_json",
)

FORMAT_VERSION = 1
"""The version of the on-disk format that this stepsave writes; see docs/format.md."""

_NATIVE = (
    "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 "
    "float16 float32 float64 complex64 complex128"
)
_EXTENDED = (
    "bfloat16 int2 int4 float4_e2m1fn float8_e3m4 float8_e4m3fn float8_e4m3fnuz "
    "float8_e4m3b11fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)

DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in _NATIVE.split()} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in _EXTENDED.split()
    if hasattr(ml_dtypes, name)
}
"""Data types that can be saved: those of tensorstore's zarr3 driver, by zarr's name.

Types below eight bits take one byte per element, as ml_dtypes keeps them in memory.
"""


def read_json(encoded: bytes) -> Any:
    """Returns what a document says, which must be JSON as stepsave writes it.

    That is in UTF-8, of finite numbers, and no object has a key twice.

    Raises:
        ValueError: If it is not, or is nested too deeply to be read.
    """
    try:
        return json.loads(
            encoded.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_object,
        )
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large")
    return number


@dataclasses.dataclass(frozen=True, slots=True)
class LeafSpec:
    """What one array of the state is, apart from its values.

    Attributes:
        path: Keys from the root of the state down to the array.
        shape: Shape of the array.
        dtype: A key of `DTYPES`.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        """The name under which Orbax and tensorstore know the array."""
        return ".".join(self.path)

    @property
    def itemsize_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkSpec:
    """One contiguous run of a leaf's bytes, or of a block of it, and where it lies in the arena.

    In the arena the chunk is followed by the four bytes of its CRC-32C (little-endian).

    Attributes:
        leaf: Index of the leaf in `LayoutPlan.leaves`.
        grid: Position in the leaf's chunk grid.
        source_bytes: Where the run starts in the C-order bytes of the leaf; in a plan of blocks,
            in those of the block that it lies in.
        data_bytes: Length of the run. Smaller than `stored_bytes` only for the last chunk
            along a split axis; the rest of the chunk is zeros.
        stored_bytes: Length of the full chunk, checksum excluded.
        offset_bytes: Where the chunk starts in the arena.
    """

    leaf: int
    grid: tuple[int, ...]
    source_bytes: int
    data_bytes: int
    stored_bytes: int
    offset_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class LayoutPlan:
    """Everything about a backup but its values: compiled once per structure.

    Attributes:
        leaves: The arrays of the state, in the order of the state.
        chunk_shapes: Shape of the chunks of each leaf.
        chunks: All chunks, ordered by leaf and grid position.
        shard_bytes: Size of each shard file, a multiple of `layout.PAGE_BYTES`.
        shard_count: Number of shards; the arena is `shard_bytes * shard_count` long.
        shard_chunks: The chunks of each shard, in the order of `chunks`.
    """

    leaves: tuple[LeafSpec, ...]
    chunk_shapes: tuple[tuple[int, ...], ...]
    chunks: tuple[ChunkSpec, ...]
    shard_bytes: int
    shard_count: int
    shard_chunks: tuple[tuple[ChunkSpec, ...], ...] = dataclasses.field(
        init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        shards: list[list[ChunkSpec]] = [[] for _ in range(self.shard_count)]
        for chunk in self.chunks:
            shards[chunk.offset_bytes // self.shard_bytes].append(chunk)
        object.__setattr__(self, "shard_chunks", tuple(map(tuple, shards)))

    @property
    def arena_bytes(self) -> int:
        return self.shard_bytes * self.shard_count

    @property
    def state_bytes(self) -> int:
        return sum(leaf.size_bytes for leaf in self.leaves)


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a backup that is proved as a whole: its size and CRC-32C."""

    path: str
    size_bytes: int
    crc32c: int

    @classmethod
    def of(cls, path: str, data: bytes) -> FileRecord:
        """The record of a file with these contents."""
        return cls(path, len(data), crc32c(data))


@dataclasses.dataclass(frozen=True, slots=True)
class BackupRecord:
    """What a commit marker says: which directory is valid, and how to prove it.

    Attributes:
        step: Global step of the backup.
        directory: Name of its directory below the backup directory.
        nonce: Random identity of the save.
        files: Every file but the shards.
        shard_bytes: Size of each shard file.
        shard_digests: For each shard the CRC-32C of its chunks' checksums, in order. It
            ties the shards to this save: a shard of another save, though each of its
            chunks proves itself, does not match.
        ended: Whether the training that made it has come to its end since.
    """

    step: int
    directory: str
    nonce: str
    files: tuple[FileRecord, ...]
    shard_bytes: int
    shard_digests: tuple[int, ...]
    ended: bool = False

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        small = sum(file.size_bytes for file in self.files)
        return small + self.shard_bytes * len(self.shard_digests)


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """Who may save in a bucket.

    Attributes:
        run: Its name, unlike any other's; what it writes lies in folders that begin with it.
        host: The machine.
        pid: The process.
    """

    run: str
    host: str
    pid: int


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """What the marker in a bucket says: who may save there, and which backups are valid.

    Attributes:
        owner: Whoever wrote it. Somebody else who replaces it may save from then on.
        backups: The valid ones, newest first; none before the first commit.
    """

    owner: Owner
    backups: tuple[BackupRecord, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Backup:
    """A restored backup.

    Attributes:
        step: The step that was passed to `save`.
        state: The state that was passed to `save`, with NumPy arrays and Python's numbers as
            leaves; named tuples, and other containers with named children, are dicts.
        metadata: The metadata that was passed to `save`, as JSON keeps it.
        ended: Whether it was said to be the last of its training, by `close(ended=True)`.
    """

    step: int
    state: Any
    metadata: dict[str, Any]
    ended: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SaveStats:
    """What saving has cost so far. Times are in seconds, sizes in bytes.

    Attributes:
        started: Saves that were captured.
        committed: Saves that became durable.
        failed: Saves that failed in the background.
        skipped: Saves not begun because both arenas were in use (`when_busy="skip"`).
        state_bytes: Bytes of state captured, all saves together.
        changed_bytes: How many of these were not known to be what the same buffer held before, in
            saves that have ended. What has always changed is not asked about at each save.
        written_bytes: Bytes written to the shards by saves that have ended.
        stall_total_s: Time callers spent inside `save`, waiting for arrays that were still
            being computed included.
        stall_median_s: Median of the same per save; NaN before the first.
        stall_max_s: Longest single call.
        durable_median_s: Median time from the call of `save` until the commit; NaN
            before the first commit.
        arena_count: Host buffers in use: 2, or 1 when memory is short.
        arena_bytes: Size of each.
        writer: `"direct"` or `"tensorstore"`; empty before the first save.
        remote_step: Step of the newest backup that was uploaded (`local_dir=`); None without.
        remote_age_s: How long ago that was saved: what is lost with the machine; NaN without.
    """

    started: int
    committed: int
    failed: int
    skipped: int
    state_bytes: int
    changed_bytes: int
    written_bytes: int
    stall_total_s: float
    stall_median_s: float
    stall_max_s: float
    durable_median_s: float
    arena_count: int
    arena_bytes: int
    writer: str
    remote_step: int | None = None
    remote_age_s: float = math.nan
