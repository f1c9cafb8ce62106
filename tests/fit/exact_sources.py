# ruff: noqa: NPY002  the global generator is meant
"""Kinds of data that the training of `exact_support` is given."""

import multiprocessing

import keras
import numpy as np
from rows import BATCH, SAMPLES, STEPS, WIDTH, Noise, NoisyTorchRows, TorchRows, samples

BACKEND = keras.backend.backend()


class Rows(keras.utils.PyDataset):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.x, self.y = samples()
        self.loaded = []

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        self.loaded.append(index)
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return self.x[rows], self.y[rows]


class NoisyRows(Rows):
    """Augments by NumPy's random generator, or by one of its own."""

    def __init__(self, random, **kwargs):
        super().__init__(**kwargs)
        self.noise = Noise(random)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return self.noise(x), y


class ShuffledRows(Rows):
    """Shuffles itself, and says how it is shuffled."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.order = np.arange(SAMPLES)

    def __getitem__(self, index):
        rows = self.order[index * BATCH : (index + 1) * BATCH]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self):
        np.random.shuffle(self.order)

    def get_state(self):
        return self.order

    def set_state(self, state):
        self.order = np.array(state)


def generator():
    x, y = samples()
    random = np.random.default_rng(5)
    while True:
        order = random.permutation(SAMPLES)
        for i in range(STEPS):
            rows = order[i * BATCH : (i + 1) * BATCH]
            yield x[rows], y[rows]


def tf_dataset(*, unknown=False, repeat=False):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(samples()).shuffle(SAMPLES)
    if repeat:
        dataset = dataset.repeat()
    dataset = dataset.batch(BATCH)
    if unknown:
        dataset = dataset.filter(lambda *_: True)
    return dataset


def tf_dataset_with_layer():
    import tensorflow as tf

    move = keras.layers.RandomTranslation(0.5, 0.0, seed=9)

    def augment(x, y):
        columns = tf.reshape(x[:, 1:], (-1, WIDTH - 1, 1, 1))
        moved = tf.reshape(move(columns, training=True), (-1, WIDTH - 1))
        return tf.concat([x[:, :1], moved], axis=1), y

    return tf_dataset().map(augment)


def torch_loader(cls=None, rows=TorchRows, **kwargs):
    import torch

    cls = cls or torch.utils.data.DataLoader
    return cls(rows(), batch_size=BATCH, shuffle=True, **kwargs)


def loader_with_workers():
    import torch

    # An iterator that is collected with the exception that ended it has lost its queues before,
    # and then waits so long for each of its workers: 5 s.
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
    if BACKEND == "torch":
        return torch_loader(num_workers=2)
    # A process with JAX or TensorFlow in it does not always survive a fork.
    multiprocessing.set_forkserver_preload(["rows", "torch.utils.data"])
    return torch_loader(num_workers=2, multiprocessing_context="forkserver")


def stateful_loader():
    from torchdata.stateful_dataloader import StatefulDataLoader

    return torch_loader(StatefulDataLoader)


class GrainRows:
    def __init__(self):
        self.x, self.y = samples()

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return self.x[index], self.y[index]

    def __repr__(self):
        return "GrainRows()"  # grain compares data by this when it goes on at a place


def grain_map():
    import grain

    return grain.MapDataset.source(GrainRows()).seed(3).shuffle().batch(BATCH)


def grain_loader():
    import grain

    sampler = grain.samplers.IndexSampler(SAMPLES, shuffle=True, seed=1, num_epochs=1)
    return grain.DataLoader(
        data_source=GrainRows(), sampler=sampler, operations=[grain.transforms.Batch(BATCH)]
    )


def arrays(shuffle):
    x, y = samples()
    return {"x": x, "y": y, "batch_size": BATCH, "shuffle": shuffle}


SOURCES = {
    "arrays": lambda: arrays(shuffle=True),
    "arrays in order": lambda: arrays(shuffle=False),
    "arrays, batches shuffled": lambda: arrays(shuffle="batch"),
    "PyDataset": lambda: {"x": Rows(), "shuffle": True},
    "PyDataset with threads": lambda: {"x": Rows(workers=2), "shuffle": True},
    "PyDataset with processes": lambda: {
        "x": Rows(workers=2, use_multiprocessing=True),
        "shuffle": True,
    },
    "PyDataset that shuffles itself": lambda: {"x": ShuffledRows(), "shuffle": False},
    "tf.data": lambda: {"x": tf_dataset()},
    "tf.data, repeated": lambda: {"x": tf_dataset(repeat=True), "steps_per_epoch": STEPS},
    "tf.data, length unknown": lambda: {"x": tf_dataset(unknown=True)},
    "torch DataLoader": lambda: {"x": torch_loader()},
    "torch DataLoader with workers": lambda: {"x": loader_with_workers()},
    "StatefulDataLoader": lambda: {"x": stateful_loader()},
    "grain MapDataset": lambda: {"x": grain_map()},
    "grain IterDataset": lambda: {"x": grain_map().to_iter_dataset()},
    "grain DataLoader": lambda: {"x": grain_loader()},
    "generator": lambda: {"x": generator(), "steps_per_epoch": STEPS},
    "PyDataset that draws from NumPy": lambda: {"x": NoisyRows(np.random), "shuffle": True},
    "PyDataset with its own generator": lambda: {
        "x": NoisyRows(np.random.default_rng(8)),
        "shuffle": True,
    },
    "torch DataLoader, rows with their own generator": lambda: {
        "x": torch_loader(rows=NoisyTorchRows)
    },
    "tf.data with a random Keras layer": lambda: {"x": tf_dataset_with_layer()},
}
NUMBERS = {source: number for number, source in enumerate(SOURCES)}  # alike on each backend

if BACKEND != "torch":
    # Keras forks them, which processes with JAX or TensorFlow in them do not always survive.
    del SOURCES["PyDataset with processes"]
