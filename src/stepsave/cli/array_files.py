"""Files of arrays that other tools read: safetensors, and NumPy's npz.

Both are written here, piece by piece: their libraries want each array whole, and a large one lies
in pieces in the memory that a backup is read into. So no second copy of the state is made.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from stepsave.errors import InvalidStateError
from stepsave.format.records import DTYPES, LeafSpec
from stepsave.snapshot.arrays import SavedArray, bits_of, bytes_of

__all__ = ("NPZ_NOTE", "write_npz", "write_safetensors")

Note = Callable[[int], None]

NPZ_NOTE = "__stepsave__"
"""In a `.npz`: a text, JSON, with the step and the dtypes that NumPy does not know by itself."""

_SAFETENSORS = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""Types that safetensors 0.8 knows and keeps as stepsave does; its F4 has two in a byte."""

_SAFETENSORS_HEADER_BYTES = 100_000_000  # that its readers take


def write_safetensors(
    path: str,
    leaves: Sequence[LeafSpec],
    arrays: Sequence[SavedArray],
    metadata: Mapping[str, str],
    note: Note,
) -> None:
    """Writes a file that stock safetensors reads.

    Args:
        path: Where to.
        leaves: What each array is.
        arrays: The arrays.
        metadata: For its header.
        note: Told of the bytes of arrays that were written.

    Raises:
        InvalidStateError: If it cannot hold one of them.
        OSError: If it cannot be written.
    """
    _check_types(leaves)
    # As the library orders them: what is larger first, so that each begins at a multiple of its
    # own size.
    order = sorted(range(len(leaves)), key=lambda number: -leaves[number].itemsize_bytes)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for number in order:
        leaf = leaves[number]
        end = at + leaf.size_bytes
        header[leaf.name] = {
            "dtype": _SAFETENSORS[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [at, end],
        }
        at = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _SAFETENSORS_HEADER_BYTES:
        raise InvalidStateError(
            f"safetensors takes {_SAFETENSORS_HEADER_BYTES} bytes of names and shapes, found "
            f"{len(encoded)}: {len(leaves)} arrays are too many. Export to .npz."
        )
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for number in order:
            for piece in bytes_of(arrays[number]):
                file.write(piece.data)
                note(len(piece))


def write_npz(
    path: str,
    leaves: Sequence[LeafSpec],
    arrays: Sequence[SavedArray],
    metadata: Mapping[str, str],
    note: Note,
) -> None:
    """Writes a file that `np.load` reads, without pickle; see `write_safetensors`.

    NumPy cannot name types such as bfloat16 in a file. Their arrays are stored as unsigned integers
    of the same bits, and `NPZ_NOTE` says of which: `data[name].view("bfloat16")` is exact.
    """
    _check_npz_names(leaves)
    foreign = {leaf.name: leaf.dtype for leaf in leaves if DTYPES[leaf.dtype].isbuiltin != 1}
    text = np.array(json.dumps({**metadata, "dtypes": foreign}))
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        _write_npy(archive, NPZ_NOTE, text, [text.reshape(-1).view(np.uint8)], lambda _: None)
        for leaf, array in zip(leaves, arrays, strict=True):
            form = np.empty(leaf.shape, bits_of(DTYPES[leaf.dtype])) if 0 in leaf.shape else None
            if form is None:  # of the right shape and type, without memory of its own
                form = np.broadcast_to(np.zeros((), bits_of(DTYPES[leaf.dtype])), leaf.shape)
            _write_npy(archive, leaf.name, form, bytes_of(array), note)


def _write_npy(
    archive: zipfile.ZipFile,
    name: str,
    form: np.ndarray,
    pieces: Iterable[np.ndarray],
    note: Note,
) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(form.dtype),
        "fortran_order": False,
        "shape": form.shape,
    }
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for piece in pieces:
            file.write(piece.data)
            note(len(piece))


def _check_types(leaves: Sequence[LeafSpec]) -> None:
    unknown = [f"{leaf.name} ({leaf.dtype})" for leaf in leaves if leaf.dtype not in _SAFETENSORS]
    if unknown:
        raise InvalidStateError(
            f"safetensors has no type for {_some(unknown)}. Export to .npz, which takes all."
        )
    for leaf in leaves:
        if leaf.name == "__metadata__":
            raise InvalidStateError(
                "safetensors keeps the name '__metadata__' for itself, and the backup has an array "
                "of that name. Export to .npz."
            )


def _check_npz_names(leaves: Sequence[LeafSpec]) -> None:
    bad = [
        leaf.name
        for leaf in leaves
        if leaf.name == NPZ_NOTE or leaf.name.endswith(".npy") or "\0" in leaf.name
    ]
    if bad:
        raise InvalidStateError(
            f"A .npz cannot hold arrays of the names {_some(list(map(repr, bad)))}: what is called "
            f"{NPZ_NOTE!r} is the exporter's note, and NumPy drops '.npy' and ends names at a zero "
            "byte. Export to .safetensors."
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")
