"""Encodes a read-only OCDBT database whose values may lie in any file.

OCDBT is tensorstore's B+tree key-value format. Its specification lets an entry point at a
byte range of *any* file below the database, so an index written once, by hand, gives names
to byte ranges of stepsave's shards. Only what a one-version, uncompressed database needs is
here.

Format: the `ocdbt` page of tensorstore's documentation, sections "Manifest format",
"Data file table format" and "B+tree node format".
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import struct
from collections.abc import Iterable, Sequence

from stepsave.format.checksum import crc32c

__all__ = ("IndexFiles", "Range", "encode")

_MANIFEST_MAGIC = 0x0CDB3A2A
_BTREE_MAGIC = 0x0CDB20DE

# A reader decodes a node as a whole and refuses one larger than the manifest's
# `max_decoded_node_bytes`; nodes are cut well below it.
_NODE_TARGET_BYTES = 4 << 20
_MAX_DECODED_NODE_BYTES = 100_000_000
_MAX_INLINE_VALUE_BYTES = 1 << 20
_VERSION_TREE_ARITY_LOG2 = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """A value stored outside the index: `length_bytes` at `offset_bytes` of a file."""

    file: str
    offset_bytes: int
    length_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class IndexFiles:
    """The two files of a database: the manifest and the file with all B+tree nodes."""

    manifest: bytes
    nodes: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class _Node:
    """An encoded node and what its parent must say of it."""

    first_key: bytes
    offset_bytes: int
    length_bytes: int
    num_keys: int
    num_tree_bytes: int
    num_indirect_bytes: int


# A database without keys has no node at all: readers refuse an empty one. tensorstore marks
# a missing root by all ones (`IndirectDataReference::Missing` in its source).
_NO_ROOT = _Node(b"", 2**64 - 1, 2**64 - 1, 0, 0, 0)


def encode(entries: Iterable[tuple[bytes, bytes | Range]], nodes_path: str) -> IndexFiles:
    """Encodes a database of the given entries.

    Args:
        entries: Keys with their values: bytes are stored in the index, a `Range` points
            at another file.
        nodes_path: Path, relative to the database, under which `IndexFiles.nodes` will be
            stored.

    Returns:
        The contents of `manifest.ocdbt` and of `nodes_path`. Equal entries give equal
        bytes.

    Raises:
        ValueError: If a key occurs twice or a single value does not fit a node.
    """
    ordered = sorted(entries, key=lambda entry: entry[0])
    for (key, _), (following, _) in itertools.pairwise(ordered):
        if key == following:
            raise ValueError(f"Key {key!r} occurs twice in the index.")

    if not ordered:
        return IndexFiles(_encode_manifest(_NO_ROOT, 0, nodes_path, b""), b"")
    nodes = bytearray()
    level = [_append_leaf(nodes, run) for run in _split(ordered)]
    height = 0
    while len(level) > 1:
        height += 1
        level = [_append_interior(nodes, run, height, nodes_path) for run in _split_nodes(level)]
    root = level[0]
    return IndexFiles(_encode_manifest(root, height, nodes_path, bytes(nodes)), bytes(nodes))


def _split(
    entries: Sequence[tuple[bytes, bytes | Range]],
) -> Iterable[Sequence[tuple[bytes, bytes | Range]]]:
    """Cuts entries into runs that each fit one leaf."""
    start, size_bytes = 0, 0
    for i, (key, value) in enumerate(entries):
        entry_bytes = len(key) + (len(value) if isinstance(value, bytes) else 32)
        if isinstance(value, bytes) and len(value) > _MAX_INLINE_VALUE_BYTES:
            raise ValueError(
                f"Value of key {key!r} has {len(value)} bytes; an index holds at most "
                f"{_MAX_INLINE_VALUE_BYTES} bytes in place."
            )
        if size_bytes + entry_bytes > _NODE_TARGET_BYTES and i > start:
            yield entries[start:i]
            start, size_bytes = i, 0
        size_bytes += entry_bytes
    yield entries[start:]


def _split_nodes(nodes: Sequence[_Node]) -> Iterable[Sequence[_Node]]:
    fan_out = 1024
    for start in range(0, len(nodes), fan_out):
        yield nodes[start : start + fan_out]


def _append_leaf(out: bytearray, entries: Sequence[tuple[bytes, bytes | Range]]) -> _Node:
    keys = [key for key, _ in entries]
    ranges = [value for _, value in entries if isinstance(value, Range)]
    files = sorted({value.file for value in ranges})
    file_ids = {file: i for i, file in enumerate(files)}
    body = b"".join(
        (
            b"\x00",  # height
            _encode_file_table(files),
            _varint(len(entries)),
            _encode_keys(keys),
            *(_varint(_value_bytes(value)) for _, value in entries),
            *(_varint(int(isinstance(value, Range))) for _, value in entries),
            *(_varint(file_ids[value.file]) for value in ranges),
            *(_varint(value.offset_bytes) for value in ranges),
            *(value for _, value in entries if isinstance(value, bytes)),
        )
    )
    encoded = _frame(_BTREE_MAGIC, body)
    offset_bytes = len(out)
    out += encoded
    return _Node(
        first_key=keys[0],
        offset_bytes=offset_bytes,
        length_bytes=len(encoded),
        num_keys=len(entries),
        num_tree_bytes=len(encoded),
        num_indirect_bytes=sum(value.length_bytes for value in ranges),
    )


def _append_interior(
    out: bytearray, children: Sequence[_Node], height: int, nodes_path: str
) -> _Node:
    keys = [child.first_key for child in children]
    body = b"".join(
        (
            bytes([height]),
            _encode_file_table([nodes_path]),
            _varint(len(children)),
            _encode_keys(keys, subtree_prefixes=True),
            *(_varint(0) for _ in children),  # data_file_id
            *(_varint(child.offset_bytes) for child in children),
            *(_varint(child.length_bytes) for child in children),
            *(_varint(child.num_keys) for child in children),
            *(_varint(child.num_tree_bytes) for child in children),
            *(_varint(child.num_indirect_bytes) for child in children),
        )
    )
    encoded = _frame(_BTREE_MAGIC, body)
    offset_bytes = len(out)
    out += encoded
    return _Node(
        first_key=keys[0],
        offset_bytes=offset_bytes,
        length_bytes=len(encoded),
        num_keys=sum(child.num_keys for child in children),
        num_tree_bytes=len(encoded) + sum(child.num_tree_bytes for child in children),
        num_indirect_bytes=sum(child.num_indirect_bytes for child in children),
    )


def _encode_manifest(root: _Node, height: int, nodes_path: str, nodes: bytes) -> bytes:
    # The uuid identifies the database in caches; derived from the contents, so that equal
    # layouts give equal bytes.
    uuid = hashlib.blake2b(nodes, digest_size=16).digest()
    config = b"".join(
        (
            uuid,
            _varint(0),  # manifest kind "single"; in the code, not yet on that page
            _varint(_MAX_INLINE_VALUE_BYTES),
            _varint(_MAX_DECODED_NODE_BYTES),
            bytes([_VERSION_TREE_ARITY_LOG2]),
            _varint(0),  # no compression
        )
    )
    commit_time_ms = 1  # not known when the layout is compiled; must not be zero
    version = b"".join(
        (
            _varint(1),  # one version …
            _varint(1),  # … of generation 1
            bytes([height]),
            _varint(0),  # data_file_id
            _varint(root.offset_bytes),
            _varint(root.length_bytes),
            _varint(root.num_keys),
            _varint(root.num_tree_bytes),
            _varint(root.num_indirect_bytes),
            struct.pack("<Q", commit_time_ms),
        )
    )
    no_older_versions = _varint(0)
    table = _encode_file_table([nodes_path])
    return _frame(_MANIFEST_MAGIC, config + table + version + no_older_versions)


def _frame(magic: int, body: bytes) -> bytes:
    """Wraps a body as OCDBT frames everything: magic, length, version, …, CRC-32C."""
    version, uncompressed = _varint(0), _varint(0)
    length_bytes = 4 + 8 + len(version) + len(uncompressed) + len(body) + 4
    head = struct.pack(">I", magic) + struct.pack("<Q", length_bytes)
    framed = head + version + uncompressed + body
    return framed + struct.pack("<I", crc32c(framed))


def _encode_file_table(files: Sequence[str]) -> bytes:
    """Encodes paths relative to the database root; all base paths are empty."""
    paths = [file.encode() for file in files]
    prefixes = [_shared(a, b) for a, b in itertools.pairwise(paths)]
    # With empty base paths the specification allows any common prefix, because every base
    # path equals the one before it.
    suffixes = [path[n:] for path, n in zip(paths, [0, *prefixes], strict=False)]
    return b"".join(
        (
            _varint(len(paths)),
            *map(_varint, prefixes),
            *(_varint(len(suffix)) for suffix in suffixes),
            *(_varint(0) for _ in paths),  # base_path_length
            *suffixes,
        )
    )


def _encode_keys(keys: Sequence[bytes], *, subtree_prefixes: bool = False) -> bytes:
    prefixes = [_shared(a, b) for a, b in itertools.pairwise(keys)]
    suffixes = [key[n:] for key, n in zip(keys, [0, *prefixes], strict=False)]
    return b"".join(
        (
            *map(_varint, prefixes),
            *(_varint(len(suffix)) for suffix in suffixes),
            # Children keep whole keys, so no prefix is implied for any subtree.
            *(_varint(0) for _ in keys if subtree_prefixes),
            *suffixes,
        )
    )


def _shared(a: bytes, b: bytes) -> int:
    """Length of the common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _value_bytes(value: bytes | Range) -> int:
    return value.length_bytes if isinstance(value, Range) else len(value)


def _varint(value: int) -> bytes:
    """LEB128, as in protocol buffers."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
