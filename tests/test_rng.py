import json
import random
import subprocess
import sys

import numpy as np
import pytest

from stepsave import Checkpointer, TrainingPosition, rng
from stepsave.errors import CorruptBackupError
from stepsave.rng import RngState

torch = pytest.importorskip("torch")


def draw():
    return (
        [random.random(), random.gauss(0, 1)],
        np.random.standard_normal(3).tobytes(),  # noqa: NPY002  the global one is the point
        torch.rand(3).numpy().tobytes(),
    )


def test_generators_go_on_where_they_were():
    draw()  # leaves a second Gaussian behind, in Python's and in NumPy's
    state = rng.capture()
    expected = [draw(), draw()]
    rng.restore(RngState.from_json(json.loads(json.dumps(state.to_json()))))
    assert [draw(), draw()] == expected


def test_capturing_draws_nothing():
    rng.restore(state := rng.capture())
    expected = draw()
    rng.restore(state)
    rng.capture()
    assert draw() == expected


def test_a_custom_loop_goes_on_in_another_process_as_if_it_had_not_been_interrupted(tmp_path):
    def run(directory, stop):
        code = [sys.executable, "-c", _LOOP, str(directory), str(stop)]
        return subprocess.run(code, capture_output=True, text=True, check=True).stdout

    whole = run(tmp_path / "whole", 100)
    assert run(tmp_path / "parts", 4) == ""
    assert run(tmp_path / "parts", 100) == whole != ""


_LOOP = """
import random, sys
import numpy as np
from stepsave import Checkpointer, TrainingPosition, rng

random.seed(1)
np.random.seed(1)
weights, first = np.zeros(3), 0
with Checkpointer(sys.argv[1]) as saver:
    backup = saver.restore()
    if backup is not None:
        weights = backup.state["weights"]
        first = TrainingPosition.from_json(backup.metadata["position"]).global_step
        rng.restore(rng.RngState.from_json(backup.metadata["rng"]))
    for step in range(first, 8):
        if step == int(sys.argv[2]):
            sys.exit()
        weights = weights + np.random.random(3) * random.random()
        position = TrainingPosition(step + 1, 0, step + 1, 8)
        metadata = {"position": position.to_json(), "rng": rng.capture().to_json()}
        saver.save(step + 1, {"weights": weights}, metadata)
print(weights.tobytes().hex())
"""


@pytest.mark.parametrize("document", [None, [], {"python": 1, "what": 2}, {"numpy": None}])
def test_a_document_that_is_no_state_is_refused(document):
    with pytest.raises(CorruptBackupError):
        RngState.from_json(document)


def test_a_state_that_a_generator_refuses_is_named():
    state = rng.capture()
    with pytest.raises(CorruptBackupError, match="refuses"):
        rng.restore(RngState(python=state.python, numpy={"bit_generator": "?"}))


assert Checkpointer
assert TrainingPosition
