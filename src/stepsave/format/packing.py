"""Python objects as JSON, with their arrays in it or beside it.

What callbacks, data loaders and random generators call their state is made of dicts, lists,
numbers, texts and arrays. JSON knows no tuples, bytes, arrays, or numbers that are not finite:
these become an object with the single key `TAG`. Reading it back executes nothing.
"""

from __future__ import annotations

import base64
import contextlib
import math
import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from stepsave.errors import CorruptBackupError, InvalidStateError
from stepsave.format.records import DTYPES

__all__ = ("pack", "unpack")

TAG = "__stepsave__"

_SAVED = frozenset(DTYPES.values())
"""Data types of arrays that a backup holds as such."""


def pack(  # noqa: PLR0911  one for each type
    value: Any, arrays: list[Any] | None = None, where: str = "state"
) -> Any:
    """Returns `value` as a document that JSON can hold.

    Args:
        value: None, bool, int, float, str, bytes, NumPy or torch array, or list, tuple or
            dict of such.
        arrays: Where arrays that a backup can hold as such are put, as they are; None to put
            the bytes of all into the document.
        where: Name of the value for error texts.

    Raises:
        InvalidStateError: If something in it is of another type.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {TAG: ["float", repr(float(value))]}
    if isinstance(value, (bytes, bytearray)):
        return {TAG: ["bytes", base64.b64encode(value).decode()]}
    if isinstance(value, list):
        return [pack(v, arrays, f"{where}[{i}]") for i, v in enumerate(cast("list[Any]", value))]
    if isinstance(value, tuple):
        items = cast("tuple[Any, ...]", value)
        return {TAG: ["tuple", pack(list(items), arrays, where)]}
    if isinstance(value, dict):
        return _pack_dict(cast("dict[Any, Any]", value), arrays, where)
    return _pack_array(value, arrays, where)


def _pack_dict(value: dict[Any, Any], arrays: list[Any] | None, where: str) -> Any:
    if all(isinstance(key, str) and key != TAG for key in value):
        return {key: pack(v, arrays, f"{where}[{key!r}]") for key, v in value.items()}
    pairs = [[k, v] for k, v in value.items()]
    return {TAG: ["dict", pack(pairs, arrays, where)]}


def _pack_array(value: Any, arrays: list[Any] | None, where: str) -> Any:
    kind = "array"
    if isinstance(value, _torch_tensor()):
        kind, value = "tensor", value.detach().cpu().numpy()
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.hasobject:
        raise InvalidStateError(
            f"{where}: expected None, a number, a text, bytes, an array, or lists, tuples and "
            f"dicts of them, found {type(value).__name__}. Convert it in `get_state`."
        )
    dtype = _name_of(value.dtype)
    if dtype is None:
        raise InvalidStateError(
            f"{where}: expected an array of numbers, texts or bytes, found one of {value.dtype}. "
            "Convert it in `get_state`, a record into an array for each field."
        )
    if isinstance(value, np.generic):
        kind = "scalar"
    elif arrays is not None and value.dtype in _SAVED:
        arrays.append(value)
        return {TAG: [f"{kind} beside", len(arrays) - 1]}
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {TAG: [kind, dtype, list(value.shape), data]}


def _name_of(dtype: np.dtype[Any]) -> str | None:
    """What NumPy makes this very data type of again; None if there is no such text."""
    for text in (dtype.name, dtype.str):  # the name leaves out the order of bytes
        with contextlib.suppress(TypeError):
            if np.dtype(text) == dtype:
                return text
    return None


def unpack(document: Any, arrays: Sequence[Any] = ()) -> Any:
    """Returns what `pack` was given.

    Args:
        document: What `pack` returned.
        arrays: The arrays that it put beside the document.

    Raises:
        CorruptBackupError: If `pack` cannot have made it.
    """
    try:
        return _unpack(document, arrays)
    except _IMPOSSIBLE as e:
        raise CorruptBackupError(f"Impossible packed value in the backup: {e}.") from e


_IMPOSSIBLE = (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,  # an integer too large for a float
    SyntaxError,  # of a data type, says NumPy
    RecursionError,
)


def _unpack(document: Any, arrays: Sequence[Any]) -> Any:
    if isinstance(document, list):
        return [_unpack(item, arrays) for item in cast("list[Any]", document)]
    if not isinstance(document, dict):
        return document
    entries = cast("dict[str, Any]", document)
    if TAG not in entries:
        return {key: _unpack(item, arrays) for key, item in entries.items()}
    return _unpack_tagged(*entries[TAG], arrays=arrays)


def _unpack_tagged(  # noqa: PLR0911  one for each kind
    kind: str, *values: Any, arrays: Sequence[Any]
) -> Any:
    if kind == "float":
        return float(values[0])
    if kind == "bytes":
        return base64.b64decode(values[0], validate=True)
    if kind == "tuple":
        return tuple(_unpack(values[0], arrays))
    if kind == "dict":
        return dict(_unpack(values[0], arrays))
    if kind in ("array beside", "tensor beside"):
        if values[0] < 0:
            raise ValueError(f"there is no array {values[0]}")
        array = arrays[values[0]]
        return array if kind == "array beside" else _to_tensor(array)
    if kind in ("array", "scalar", "tensor"):
        name, shape, data = values
        dtype = np.dtype(name)
        if name not in (dtype.name, dtype.str):
            raise ValueError(f"there is no data type {name!r}")
        flat = np.frombuffer(base64.b64decode(data, validate=True), dtype)
        array = flat.reshape(shape).copy()  # writable, unlike the bytes
        if kind == "scalar":
            return array[()]
        return array if kind == "array" else _to_tensor(array)
    raise ValueError(f"unknown kind {kind!r}")


def _torch_tensor() -> Any:
    """The class of torch tensors; no class at all where torch is not imported."""
    torch = sys.modules.get("torch")
    return () if torch is None else torch.Tensor


def _to_tensor(array: Any) -> Any:
    import torch  # needed only where a torch object gave the state

    return torch.from_numpy(np.array(array))
