"""Training data that worker processes of a torch `DataLoader` hold; without Keras, which takes
them long to import."""

import numpy as np

SAMPLES = 26
WIDTH = 5
BATCH = 4
STEPS = 7  # the last batch has two samples


def samples():
    """Inputs whose first column numbers them, and targets."""
    random = np.random.default_rng(3)
    x = random.standard_normal((SAMPLES, WIDTH)).astype(np.float32)
    x[:, 0] = np.arange(SAMPLES)
    y = (x[:, 1:].sum(axis=1, keepdims=True) > 0).astype(np.float32)
    return x, y


class TorchRows:
    def __init__(self):
        self.x, self.y = samples()
        self.loaded = []

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.loaded.append(index)
        return self.x[index], self.y[index]


class NoisyTorchRows(TorchRows):
    """Augments by a random generator of its own, which lies in what it transforms by."""

    def __init__(self):
        super().__init__()
        self.transforms = [Noise(np.random.default_rng(8))]

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        for transform in self.transforms:
            x = transform(x)
        return x, y


class Noise:
    """Adds noise to all but the first column, which numbers the samples."""

    def __init__(self, random):
        self.random = random

    def __call__(self, x):
        noise = self.random.normal(size=x.shape).astype(np.float32)
        noise[..., 0] = 0
        return x + noise
