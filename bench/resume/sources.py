"""The same images from every source of data that `fit` takes.

Bytes in memory; arrays are handed out as they are, all others turn them into float32 as they
load them. The target of an image is its number, so that a batch says which images it has.
Imports no framework: worker processes import this too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

VALUES = 32 * 32 * 3
BATCH = 32
APART = 16  # bytes from the begin of an image to that of the next: they overlap
SHUFFLE_BUFFER = 1024
WORKERS = 2
SEED = 11

Make = Callable[["Images"], dict[str, Any]]


class Images:
    """Images for so many batches, of which each differs, in the memory of a few.

    Also what torch and grain take as data that is read by index.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        size_bytes = len(self) * APART + VALUES
        self.buffer = np.random.default_rng(0).integers(0, 256, size_bytes, np.uint8)

    @property
    def x(self) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(self.buffer, VALUES)[: len(self) * APART][
            ::APART
        ]

    @property
    def y(self) -> np.ndarray:
        return self.targets(np.arange(len(self)))

    def targets(self, rows: np.ndarray) -> np.ndarray:
        return (rows / len(self)).astype(np.float32)[:, None]

    def load(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A batch."""
        return self.x[rows].astype(np.float32), self.targets(rows)

    def __len__(self) -> int:
        return self.batches * BATCH

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        begin = int(index) * APART
        x = self.buffer[begin : begin + VALUES].astype(np.float32)
        return x, np.array([index / len(self)], np.float32)

    def __repr__(self) -> str:
        return f"Images({self.batches})"  # grain compares data by this when it goes on at a place


def _arrays(images: Images) -> dict[str, Any]:
    return {"x": images.x, "y": images.y, "batch_size": BATCH, "shuffle": True}


def _py_dataset(images: Images, **settings: Any) -> dict[str, Any]:
    import keras

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return images.batches

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return images.load(np.arange(index * BATCH, (index + 1) * BATCH))

    return {"x": Batches(**settings), "shuffle": True}


def _tf_data(images: Images) -> dict[str, Any]:
    import tensorflow as tf

    buffer = tf.constant(images.buffer)

    def load(index: Any) -> tuple[Any, Any]:
        x = tf.slice(buffer, [index * APART], [VALUES])
        return tf.cast(x, tf.float32), [tf.cast(index / len(images), tf.float32)]

    dataset = tf.data.Dataset.range(len(images)).shuffle(SHUFFLE_BUFFER, seed=SEED).map(load)
    return {"x": dataset.batch(BATCH)}


def _torch(images: Images, cls: Any = None, **settings: Any) -> dict[str, Any]:
    import torch

    cls = cls or torch.utils.data.DataLoader
    return {"x": cls(images, batch_size=BATCH, shuffle=True, **settings)}


def _torch_workers(images: Images) -> dict[str, Any]:
    import multiprocessing

    # Not forked from here: processes with JAX or TensorFlow in them do not always survive that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "bench.common", __name__])
    return _torch(images, num_workers=WORKERS, multiprocessing_context=context)


def _torch_stateful(images: Images) -> dict[str, Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return _torch(images, StatefulDataLoader)


def _grain_map(images: Images) -> Any:
    import grain

    return grain.MapDataset.source(images).seed(SEED).shuffle().batch(BATCH)


def _grain_loader(images: Images) -> dict[str, Any]:
    import grain

    sampler = grain.samplers.IndexSampler(len(images), shuffle=True, seed=SEED, num_epochs=1)
    operations = [grain.transforms.Batch(BATCH)]
    return {"x": grain.DataLoader(data_source=images, sampler=sampler, operations=operations)}


def _generate(images: Images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(SEED)
    while True:
        for rows in random.permutation(len(images)).reshape(-1, BATCH):
            yield images.load(rows)


SOURCES: dict[str, Make] = {
    "arrays, shuffled": _arrays,
    "PyDataset": _py_dataset,
    "PyDataset, 2 threads": lambda images: _py_dataset(images, workers=WORKERS),
    "tf.data": _tf_data,
    "torch DataLoader": _torch,
    "torch DataLoader, 2 workers": _torch_workers,
    "StatefulDataLoader": _torch_stateful,
    "grain MapDataset": lambda images: {"x": _grain_map(images)},
    "grain IterDataset": lambda images: {"x": _grain_map(images).to_iter_dataset()},
    "grain DataLoader": _grain_loader,
    "generator": lambda images: {"x": _generate(images), "steps_per_epoch": images.batches},
}
