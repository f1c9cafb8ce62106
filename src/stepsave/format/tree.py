"""Trees of containers and arrays, as flat lists and back.

An array's path is that of Orbax's standard names: the key in a dict, the number in a list or a
tuple, the field of a named tuple. What paths cannot say (that a dict was a tuple, that keys were
integers, what is empty) is in *notes*; a nested dict of arrays with texts as keys needs none.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, cast

import numpy as np

from stepsave.errors import CorruptBackupError, FormatVersionError, InvalidStateError
from stepsave.format.records import FORMAT_VERSION, read_json

__all__ = (
    "Fields",
    "FlatState",
    "Note",
    "NotedLeaf",
    "decode_structure",
    "decode_training",
    "encode_structure",
    "flatten",
    "flatten_state",
    "rebuild",
    "unflatten",
)

MAX_DEPTH = 64
STRUCTURE_VERSION = 1

Path = tuple[str, ...]
Note = tuple[Path, str, Any]
"""Path of a node, its kind, and what else there is to say; docs/format.md has the kinds."""

_SCALARS: dict[str, type] = {"bool": bool, "int": int, "float": float, "complex": complex}

# By type, what a value is; types of arrays are added as they come. `fields`: a named tuple.
_kinds: dict[type, str] = {
    dict: "dict",
    list: "list",
    tuple: "tuple",
    type(None): "none",
    np.ndarray: "array",
    **{kind: name for name, kind in _SCALARS.items()},
}


@dataclasses.dataclass(frozen=True, slots=True)
class FlatState:
    """A state as flat lists.

    Attributes:
        paths: Where each array is.
        leaves: The arrays, and numbers, in the order of the state.
        notes: What paths cannot say, children before their parents.
    """

    paths: list[Path]
    leaves: list[Any]
    notes: list[Note]


@dataclasses.dataclass(frozen=True, slots=True)
class NotedLeaf:
    """An array in place of what was found, and the kind and value of the note that says so."""

    array: Any
    kind: str
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Fields:
    """A container that is none of Python's: its children by name, and how to make another."""

    items: Mapping[str, Any]
    build: Callable[[Sequence[Any]], Any]


Opener = Callable[[Any], "NotedLeaf | Fields | None"]
"""Says what a value is that is no container of Python's; None for arrays."""


def flatten(state: Any) -> tuple[list[Path], list[Any]]:
    """Lists the leaves of a state with their paths, in order; see `flatten_state`."""
    flat = flatten_state(state)
    return flat.paths, flat.leaves


def flatten_state(state: Any, open_leaf: Opener | None = None) -> FlatState:
    """Lists the leaves of a state with their paths, in the order of the state.

    Args:
        state: Dicts, lists, tuples and named tuples of arrays, numbers and None.
        open_leaf: Knows further containers, and leaves that are noted.

    Raises:
        InvalidStateError: If the state is no container, a key is neither a text nor an integer,
            or two keys of a dict are the same as texts.
    """
    walk = _Walk(open_leaf)
    if state is not None and not isinstance(state, str):
        walk.visit(state, ())
    if walk.paths == [()] or state is None or isinstance(state, str):
        raise InvalidStateError(
            f"Invalid value for argument `state`. Expected a dict, list or tuple of arrays, found "
            f"{type(state).__name__}."
        )
    return FlatState(walk.paths, walk.leaves, walk.notes)


class _Walk:
    """Goes through a state once."""

    def __init__(self, open_leaf: Opener | None) -> None:
        self._open_leaf = open_leaf
        self.paths: list[Path] = []
        self.leaves: list[Any] = []
        self.notes: list[Note] = []

    def visit(self, value: Any, at: Path) -> None:
        if len(at) > MAX_DEPTH:
            raise InvalidStateError(
                f"State {'/'.join(at[:3])}…: nested deeper than {MAX_DEPTH}. Flatten it."
            )
        kind = _kinds.get(type(value)) or _find_kind(value, at, self._open_leaf)
        if kind == "dict":
            self._visit_dict(cast("Mapping[Any, Any]", value), at)
        elif kind == "fields":
            self._visit_dict(value._asdict(), at)
        elif kind in ("list", "tuple"):
            for number, child in enumerate(cast("Sequence[Any]", value)):
                self.visit(child, (*at, str(number)))
            self.notes.append((at, kind, len(value)))
        elif kind == "none":
            self.notes.append((at, kind, None))
        elif kind == "opened":
            self._visit_opened(value, at)
        else:
            self._add(value, at)
            if kind != "array":
                self.notes.append((at, kind, None))

    def _visit_opened(self, value: Any, at: Path) -> None:
        assert self._open_leaf is not None
        opened = self._open_leaf(value)
        if isinstance(opened, Fields):
            self._visit_dict(opened.items, at)
        elif opened is not None:
            self._add(opened.array, at)
            self.notes.append((at, opened.kind, opened.value))

    def _visit_dict(self, node: Mapping[Any, Any], at: Path) -> None:
        # The order of keys is that of the arrays, unless one has no array below it.
        is_noted = not node and at != ()
        for key, value in node.items():
            if type(key) is not str and not isinstance(key, str):
                name = _name_of(key, node, at)
                is_noted = True
            else:
                name = key
            if _kinds.get(type(value)) == "array":  # by far the most: a state may have 10,000
                self.paths.append((*at, name))
                self.leaves.append(value)
                continue
            before = len(self.paths)
            self.visit(value, (*at, name))
            is_noted = is_noted or len(self.paths) == before
        if is_noted:
            self.notes.append((at, "dict", list(node)))

    def _add(self, leaf: Any, at: Path) -> None:
        self.paths.append(at)
        self.leaves.append(leaf)


def _find_kind(value: Any, at: Path, open_leaf: Opener | None) -> str:
    """The kind of a value whose type was not seen before, or is asked for each time."""
    if isinstance(value, Mapping):
        kind = "dict"
    elif isinstance(value, tuple):
        kind = "fields" if hasattr(cast("Any", value), "_fields") else "tuple"
    elif isinstance(value, list):
        kind = "list"
    elif isinstance(value, (str, bytes, bytearray, set, frozenset)):
        raise InvalidStateError(
            f"State {'/'.join(at)!r}: expected an array, a number, None, or a dict, list or tuple "
            f"of them, found {type(cast('object', value)).__name__}. Put texts into the "
            "metadata, and make a list of a set."
        )
    else:
        try:
            if open_leaf is None:
                return "array"
            if open_leaf(value) is not None:
                return "opened"
        except InvalidStateError as e:
            raise InvalidStateError(f"State {'/'.join(at)!r}: {e}") from e
        kind = "array"
    return _kinds.setdefault(cast("type", type(value)), kind)


def _name_of(key: Any, node: Mapping[Any, Any], at: Path) -> str:
    """The name of a key that is no text."""
    if type(key) is not int:
        raise InvalidStateError(
            f"Key {key!r} in state[{'/'.join(at)!r}]: expected a string or an integer, found "
            f"{type(key).__name__}. Use str({key!r})."
        )
    name = str(key)
    if name in node:
        raise InvalidStateError(
            f"Keys {key!r} and {name!r} in state[{'/'.join(at)!r}] would both be stored as "
            f"{name!r}. Rename one of them."
        )
    return name


def unflatten(paths: Sequence[Path], leaves: Sequence[Any], notes: Iterable[Note] = ()) -> Any:
    """The inverse of `flatten_state`, but for named tuples and the like: these become dicts.

    Raises:
        ValueError, TypeError, LookupError: If the notes do not fit the paths.
    """
    top: dict[str, Any] = {"state": {}}
    for path, leaf in zip(paths, leaves, strict=True):
        node = top["state"]
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    for path, kind, value in notes:
        node = top
        *parents, name = ("state", *path)
        for key in parents:
            node = node.setdefault(key, {})
            if type(node) is not dict:
                raise ValueError(f"{path}: nothing can be below {type(node).__name__}")
        node[name] = _from_note(kind, value, node.get(name, {}), path)
    return top["state"]


def _from_note(kind: str, value: Any, found: Any, path: Path) -> Any:
    """What a node is, of what its path alone made of it."""
    if kind == "prng_key" and isinstance(found, np.ndarray):
        return cast("Any", found)
    if kind in _SCALARS and isinstance(found, np.ndarray):
        return _SCALARS[kind](cast("Any", found).item())
    if type(found) is dict:
        children = cast("dict[str, Any]", found)
        if kind == "none" and not children:
            return None
        if kind in ("list", "tuple") and len(children) == value:
            items = [children[str(number)] for number in range(len(children))]
            return items if kind == "list" else tuple(items)
        # Each key once, or a child would be lost.
        if kind == "dict" and len(children) == len(value) == len({str(key) for key in value}):
            return {key: children[str(key)] for key in value}
    raise ValueError(f"{path}: noted as {kind!r} of {value!r}, but found {type(found).__name__}")


def rebuild(like: Any, leaves: Iterator[Any], open_leaf: Opener) -> Any:
    """Returns a state like another one, with other leaves.

    Args:
        like: The other state.
        leaves: In the order of `flatten_state`.
        open_leaf: As there.
    """
    kind = _kinds.get(type(like)) or _find_kind(like, (), open_leaf)
    if kind == "none":
        return None
    if kind == "dict":
        return _rebuild_dict(
            cast("Mapping[Any, Any]", like),
            {key: rebuild(child, leaves, open_leaf) for key, child in like.items()},
        )
    if kind in ("list", "tuple", "fields"):
        children = [rebuild(child, leaves, open_leaf) for child in cast("Sequence[Any]", like)]
        if kind == "fields":
            return like._make(children)
        return children if kind == "list" else tuple(children)
    if kind == "opened":
        opened = open_leaf(like)
        if isinstance(opened, Fields):
            items = opened.items.values()
            return opened.build([rebuild(child, leaves, open_leaf) for child in items])
    return next(leaves)


def _rebuild_dict(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(like) is dict:
        return items
    if isinstance(like, dict):  # with its own order, or what it makes of missing keys
        again = copy(like)
        again.update(items)
        return again
    # Not by `copy`, which may share what the mapping wraps: `like` would be changed.
    return cast("Any", type(like))(items)


def encode_structure(notes: Sequence[Note]) -> str:
    """Encodes notes as JSON; no text at all if there are none."""
    if not notes:
        return ""
    entries = [note if note[2] is not None else note[:2] for note in notes]
    document = {"version": STRUCTURE_VERSION, "notes": entries}
    return json.dumps(document, separators=(",", ":"))


def decode_structure(document: Any) -> list[Note]:
    """Takes notes back from what JSON made of them; None stands for none.

    Raises:
        FormatVersionError: If a newer stepsave wrote them.
        ValueError, TypeError, LookupError: If they are malformed.
    """
    if document is None:
        return []
    if document["version"] != STRUCTURE_VERSION:
        raise FormatVersionError(
            f"The structure of the state is written in version {document['version']!r}, but this "
            f"stepsave reads version {STRUCTURE_VERSION}. Install a newer stepsave to restore "
            "this backup."
        )
    notes: list[Note] = []
    for path, kind, *values in document["notes"]:
        is_path = len(path) <= MAX_DEPTH + 1 and all(isinstance(key, str) for key in path)
        if not is_path or len(values) > 1:
            raise ValueError(f"note {[path, kind, *values]!r:.200}")
        value = values[0] if values else None
        if kind == "dict" and not all(type(key) in (str, int) for key in values[0]):
            raise ValueError(f"keys {value!r}")
        notes.append((tuple(path), kind, value))
    return notes


def decode_training(
    encoded: bytes, source: str, paths: Sequence[Path] | None, leaves: Sequence[Any] = ()
) -> tuple[dict[str, Any], list[Note]]:
    """Decodes and checks `training.json`; trusts nothing that it says.

    Args:
        encoded: The file's bytes.
        source: The file's path, for error texts.
        paths: Where each array of the backup is; None if that is not known.
        leaves: The arrays, or what has their types and shapes.

    Returns:
        The document, whose metadata is a dict, and its notes, which fit the arrays.

    Raises:
        FormatVersionError: If a newer stepsave wrote it.
        CorruptBackupError: If it is malformed.
    """
    try:
        document = read_json(encoded)
        _check_training(document)
        notes = decode_structure(document.get("structure"))
        if paths is not None:
            unflatten(paths, leaves, notes)
    except FormatVersionError as e:
        raise FormatVersionError(f"{source}: {e}") from e
    except (ValueError, TypeError, LookupError, AttributeError) as e:
        raise CorruptBackupError(
            f"{source}: expected metadata, and a structure that fits the arrays, found {e!r:.300}."
        ) from e
    return document, notes


def _check_training(document: dict[str, Any]) -> None:
    version, metadata = document["format"], document["metadata"]
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"written in format {version}, but this stepsave reads format {FORMAT_VERSION}. "
            "Install a newer stepsave to restore this backup."
        )
    if version != FORMAT_VERSION or type(metadata) is not dict:
        raise ValueError(f"format {version!r:.40} with metadata in {type(metadata).__name__}")
