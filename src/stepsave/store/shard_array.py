"""Writes shards through tensorstore: the reference writer, for any file system and bucket."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from stepsave.format.orbax import ARENA_PATH, arena_metadata, shard_path
from stepsave.format.records import LayoutPlan
from stepsave.store.places import Store

__all__ = ("ShardArray",)


class ShardArray:
    """The arena of one backup directory as a zarr3 array whose chunks are the shards."""

    def __init__(self, store: Store, directory: str, plan: LayoutPlan) -> None:
        # Imported on first use: tensorstore starts threads, and older releases aborted in
        # children forked after that (google/tensorstore#217).
        ts: Any = importlib.import_module("tensorstore")
        self._store, self._directory = store, directory
        self._shard_bytes = plan.shard_bytes
        spec = {
            "driver": "zarr3",
            "kvstore": store.kvstore(f"{directory}/{ARENA_PATH}"),
            "metadata": arena_metadata(plan.shard_bytes, plan.shard_count),
            # A shard of zeros must be there too, or a lost one could not be told from it.
            "store_data_equal_to_fill_value": True,
        }
        # `zarr.json` is already there; opening must not write it a second time.
        opened = ts.open(spec, open=True, assume_metadata=True, context=store.context)
        self._array: Any = store.wait(opened, f"open {directory}", 0)

    def write(self, number: int, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Writes one shard and returns when it is durable.

        Args:
            number: Which shard.
            data: Its bytes, shape `(shard_bytes,)`. Must not change meanwhile.
        """
        start = number * self._shard_bytes
        target = self._array[start : start + self._shard_bytes]
        self._store.write_array(f"{self._directory}/{shard_path(number)}", target, data)
