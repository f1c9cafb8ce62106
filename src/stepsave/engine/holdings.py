"""What one of several processes keeps on a disk of its own: read back, and uploaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepsave.engine.extents import Needs
from stepsave.engine.known_files import TRAINING_PATH, training_path
from stepsave.engine.reader import StoredBackup, read_backup, read_files
from stepsave.errors import BackupMismatchError, CorruptBackupError
from stepsave.format import orbax
from stepsave.format.holding import (
    HOLDING_PATH,
    Holding,
    decode_holding,
    first_chunk,
    place_of,
)
from stepsave.format.layout import Grid
from stepsave.format.records import DTYPES, BackupRecord, LeafSpec
from stepsave.format.tree import FlatState
from stepsave.snapshot.arrays import HostArray, SavedArray, ScatteredArray
from stepsave.store.local import LocalStore
from stepsave.threads import Crew

__all__ = ("read_held", "read_holding", "whole_files")


def read_holding(store: LocalStore, record: BackupRecord, helpers: Crew) -> Holding | None:
    """Returns which part of a backup of several processes one is; None if it is a whole.

    Raises:
        FormatVersionError, CorruptBackupError, OSError: If that cannot be read.
    """
    some = tuple(file for file in record.files if file.path == HOLDING_PATH)
    if not some:
        return None
    source = str(store.path(f"{record.directory}/{HOLDING_PATH}"))
    return decode_holding(read_files(store, record, helpers, some)[HOLDING_PATH], source)


def whole_files(files: Mapping[str, bytes], holding: Holding, rank: int) -> dict[str, bytes]:
    """Returns the files of a backup of all processes, from those of the part of one.

    Args:
        files: By path.
        holding: Which part it is.
        rank: Whose; only process 0 has more than what it knows of the training.
    """
    if rank:
        return {training_path(rank): files[TRAINING_PATH]}
    kept = {path: data for path, data in files.items() if path != HOLDING_PATH}
    return kept | orbax.constant_files(holding.plan, holding.device)


def read_held(
    store: LocalStore, record: BackupRecord, helpers: Crew, holding: Holding, needs: Needs | None
) -> StoredBackup:
    """Reads what this process has kept, in the structure of the whole state.

    Raises:
        BackupMismatchError: If it needs something else.
        Exception: As `read_backup`.
    """

    def join(stored: Sequence[LeafSpec], leaves: Sequence[SavedArray]) -> Sequence[SavedArray]:
        source = str(store.path(record.directory))
        try:
            return _join(holding, stored, leaves)
        except (ValueError, KeyError, IndexError) as e:
            raise CorruptBackupError(f"{source}: its blocks do not fit together: {e!r}.") from e

    all_of_it = Needs(on_read=None if needs is None else needs.on_read)
    found = read_backup(store, record, helpers, all_of_it, whole=(holding.plan.leaves, join))
    _check_needs(str(store.root), found.flat, holding.plan.leaves, needs)
    return found


def _join(
    holding: Holding, stored: Sequence[LeafSpec], leaves: Sequence[SavedArray]
) -> list[SavedArray]:
    """Returns the arrays of the state, as far as there are blocks of them."""
    whole = holding.plan
    numbers = {leaf.path: number for number, leaf in enumerate(whole.leaves)}
    chunks: list[dict[Grid, HostArray]] = [{} for _ in numbers]
    alone: dict[int, SavedArray] = {}
    for spec, leaf in zip(stored, leaves, strict=True):
        number = numbers[spec.path[:-1]]
        chunk_shape = whole.chunk_shapes[number]
        block, counts = place_of(spec.path[-1], len(spec.shape))
        if set(counts) <= {1}:
            alone[number] = leaf
            continue
        first = first_chunk(block, chunk_shape, spec.shape)
        pieces = leaf.chunks if isinstance(leaf, ScatteredArray) else {(0,) * len(first): leaf}
        for place, piece in pieces.items():
            chunks[number][tuple(map(int.__add__, first, place))] = piece
    return [
        alone[number]
        if number in alone
        else ScatteredArray(leaf.shape, DTYPES[leaf.dtype], whole.chunk_shapes[number], some)
        for (number, leaf), some in zip(enumerate(whole.leaves), chunks, strict=True)
    ]


def _check_needs(
    place: str, flat: FlatState, specs: Sequence[LeafSpec], needs: Needs | None
) -> None:
    regions = {} if needs is None or needs.regions is None else needs.regions(specs)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if not isinstance(leaf, ScatteredArray):
            continue
        whole = [[slice(0, size) for size in leaf.shape]]
        if not all(leaf.has(region) for region in regions.get(tuple(path), whole)):
            raise BackupMismatchError(
                f"{place}: expected the part of {'/'.join(path)!r} that this process trains now, "
                "found another one: the model is spread over processes in another way than "
                "when it was saved. What is in the bucket fits any."
            )
