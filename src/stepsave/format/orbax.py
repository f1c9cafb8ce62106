"""The constant files that make a backup a standard Orbax checkpoint.

Orbax (0.12) reads a *checkpointable* named `pytree` from a directory that holds a tree
description (`_METADATA`), an OCDBT database with one zarr3 array per leaf, and a marker of
completion. All of them follow from the layout alone, so they are made once and kept.

Formats: Orbax `checkpoint/_src/metadata/tree.py` for `_METADATA`, the Zarr v3 specification
for `zarr.json`, `stepsave.format.ocdbt` for the index.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any

from stepsave.format import ocdbt
from stepsave.format.layout import CHECKSUM_BYTES, encode_layout
from stepsave.format.records import LayoutPlan, read_json

__all__ = (
    "ARENA_PATH",
    "COMMIT_SUCCESS",
    "INDEX_PATH",
    "LAYOUT_PATH",
    "MANIFEST_PATH",
    "METADATA_PATH",
    "SUCCESS_PATH",
    "checkpoint_metadata",
    "constant_files",
    "json_item",
    "saved_at_s",
    "shard_path",
)

LAYOUT_PATH = "layout.json"
MANIFEST_PATH = "pytree/manifest.ocdbt"
ARENA_PATH = "pytree/d"
INDEX_PATH = "pytree/d/index"
METADATA_PATH = "_CHECKPOINT_METADATA"
SUCCESS_PATH = "commit_success.txt"
COMMIT_SUCCESS = b"Checkpoint commit was successful\n"

_DATABASE = "pytree"
_PYTREE_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_DICT_KEY = 2  # Orbax's KeyType.DICT


def shard_path(number: int) -> str:
    """Path of a shard in a backup: the chunk key of the arena as a zarr3 array."""
    return f"{ARENA_PATH}/c/{number}"


def constant_files(plan: LayoutPlan, device: str | None = None) -> dict[str, bytes]:
    """Returns every file that depends on the layout only, by path in the backup.

    Args:
        plan: The layout.
        device: JAX's name of the device that the arrays come from, if they are JAX arrays.
            Orbax looks there for an array that it is asked to restore as a JAX array without
            being told where to, as Keras does under a JAX distribution.
    """
    index = ocdbt.encode(_index_entries(plan), nodes_path=_in_database(INDEX_PATH))
    return {
        LAYOUT_PATH: encode_layout(plan),
        MANIFEST_PATH: index.manifest,
        INDEX_PATH: index.nodes,
        f"{ARENA_PATH}/zarr.json": _dump(arena_metadata(plan.shard_bytes, plan.shard_count)),
        f"{_DATABASE}/_METADATA": _dump(_tree_metadata(plan)),
        f"{_DATABASE}/_sharding": _dump(_shardings(plan, device)),
        f"{_DATABASE}/array_metadatas/process_0": _dump(_array_metadatas(plan)),
        f"{_DATABASE}/commit_success.txt": COMMIT_SUCCESS,
        SUCCESS_PATH: COMMIT_SUCCESS,
    }


def json_item(name: str, strings: Mapping[str, str]) -> dict[str, bytes]:
    """Returns the files of a checkpointable that holds strings only."""
    tree = {
        str((key,)): {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY}],
            "value_metadata": {"value_type": "string", "skip_deserialize": False},
        }
        for key in strings
    }
    return {
        f"{name}/_METADATA": _dump(_metadata_of(tree)),
        f"{name}/_strings.json": _dump(dict(strings)),
        f"{name}/commit_success.txt": COMMIT_SUCCESS,
    }


def checkpoint_metadata(items: Iterable[str], begin_ns: int, seal_ns: int) -> bytes:
    """Returns `_CHECKPOINT_METADATA`: which checkpointables there are, and when.

    Args:
        items: Names of the checkpointables beside `pytree`.
        begin_ns: When the save began, in nanoseconds since the epoch.
        seal_ns: When its data was complete.
    """
    return _dump(
        {
            "item_handlers": dict.fromkeys(["pytree", *items], _PYTREE_HANDLER),
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": begin_ns,
            "commit_timestamp_nsecs": seal_ns,
            "custom_metadata": {},
        }
    )


def saved_at_s(checkpoint_metadata: bytes) -> float:
    """When the data of a backup was complete, in seconds since the epoch; by its metadata.

    Raises:
        ValueError: If they do not say so.
    """
    try:
        time_ns = read_json(checkpoint_metadata)["commit_timestamp_nsecs"]
    except (KeyError, TypeError) as e:
        raise ValueError(f"no `commit_timestamp_nsecs` in {METADATA_PATH}") from e
    if type(time_ns) is not int or not 0 <= time_ns < 1 << 63:
        raise ValueError(f"`commit_timestamp_nsecs` {time_ns!r:.40} in {METADATA_PATH}")
    return time_ns / 1e9


def arena_metadata(shard_bytes: int, shard_count: int) -> dict[str, Any]:
    """Returns `zarr.json` of the arena: one axis of bytes, one chunk per shard."""
    return _array_metadata((shard_bytes * shard_count,), (shard_bytes,), "uint8", ["bytes"])


def _index_entries(plan: LayoutPlan) -> list[tuple[bytes, bytes | ocdbt.Range]]:
    entries: list[tuple[bytes, bytes | ocdbt.Range]] = []
    for leaf, chunk_shape in zip(plan.leaves, plan.chunk_shapes, strict=True):
        metadata = _array_metadata(leaf.shape, chunk_shape, leaf.dtype, ["bytes", "crc32c"])
        entries.append((f"{leaf.name}/zarr.json".encode(), _dump(metadata)))
    for chunk in plan.chunks:
        name = plan.leaves[chunk.leaf].name
        key = "/".join((name, "c", *map(str, chunk.grid)))
        shard, offset_bytes = divmod(chunk.offset_bytes, plan.shard_bytes)
        length_bytes = chunk.stored_bytes + CHECKSUM_BYTES
        where = ocdbt.Range(_in_database(shard_path(shard)), offset_bytes, length_bytes)
        entries.append((key.encode(), where))
    return entries


def _array_metadata(
    shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: str, codecs: list[str]
) -> dict[str, Any]:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    is_single_byte = dtype in ("bool", "uint8", "int8")
    fill_value: Any = False if dtype == "bool" else [0, 0] if dtype.startswith("complex") else 0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": fill_value,
        "codecs": [
            {"name": codec} if codec != "bytes" or is_single_byte else little_endian
            for codec in codecs
        ],
    }


def _tree_metadata(plan: LayoutPlan) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for leaf in plan.leaves:
        tree[str(leaf.path)] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in leaf.path],
            "value_metadata": {
                # Not `jax.Array`: NumPy arrays load on any topology and on any backend.
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(leaf.shape),
            },
        }
    return _metadata_of(tree)


def _shardings(plan: LayoutPlan, device: str | None) -> dict[str, str]:
    if device is None:
        return {}
    sharding = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": device})
    return {base64.b64encode(leaf.name.encode()).decode(): sharding for leaf in plan.leaves}


def _metadata_of(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _array_metadatas(plan: LayoutPlan) -> dict[str, Any]:
    return {
        "array_metadatas": [
            {
                "array_metadata": {
                    "param_name": leaf.name,
                    "write_shape": list(leaf.shape),
                    "chunk_shape": list(chunk_shape),
                    "ext_metadata": None,
                }
            }
            for leaf, chunk_shape in zip(plan.leaves, plan.chunk_shapes, strict=True)
        ]
    }


def _in_database(path: str) -> str:
    return path.removeprefix(f"{_DATABASE}/")


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
