"""Random generators that a data set owns."""

import json
import random

import keras
import numpy as np
import pytest

from stepsave.fit.sources.generators import OwnGenerators


class Holder:
    """A data set that holds generators of all kinds, here and there."""

    def __init__(self):
        import torch

        self.itself = self
        self.all = np.random  # a module: its generators are the global ones
        self.transforms = [{"numpy": np.random.default_rng(1)}, (random.Random(2),)]
        self.legacy = np.random.RandomState(3)
        self.torch = torch.Generator().manual_seed(4)
        self.layer = keras.layers.Dropout(0.5, seed=5)

    def draw(self):
        import torch

        dropped = self.layer(np.ones((1, 20), "float32"), training=True)
        return (
            self.transforms[0]["numpy"].random(),
            self.transforms[1][0].random(),
            self.legacy.random(),
            float(torch.rand((), generator=self.torch)),
            keras.ops.convert_to_numpy(dropped).tolist(),
        )


def test_generators_are_found_wherever_a_data_set_holds_them_and_put_back():
    data = Holder()
    data.draw()
    found = OwnGenerators(data)
    state = json.loads(json.dumps(found.state()))
    assert len(state) == 5
    expected = [data.draw() for _ in range(2)]
    found.set_state(state)
    assert [data.draw() for _ in range(2)] == expected
    again = Holder()
    OwnGenerators(again).set_state(state)
    assert [again.draw() for _ in range(2)] == expected


@pytest.mark.parametrize("data", [None, 3, [], np.random, np.random.mtrand._rand, [np.zeros(3)]])
def test_data_without_generators_of_its_own_has_none(data):
    assert not OwnGenerators(data)
