"""A backup made on one backend is restored on each other."""

import shutil

import numpy as np
import pytest
from keras_support import (
    BACKEND,
    BACKENDS,
    STEPS,
    X_INT,
    Child,
    Interrupt,
    fit,
    restored,
    rich_model,
    variables_of,
)

import stepsave

pytestmark = [
    pytest.mark.slow,  # starts the other backends, which `make test` runs by themselves
    pytest.mark.xdist_group("other backends"),
]

OPTIMIZER = "adam"  # two slots per variable
OTHERS = [backend for backend in BACKENDS if backend != BACKEND]

_SAVE = """
import sys
import numpy as np
from keras_support import *

directory, arrays = sys.argv[1:]
model = rich_model("adam")
callback = stepsave.BackupAndRestore(directory, 5, delete_checkpoint=False)
keras.utils.set_random_seed(3)
interrupt = Interrupt(step=10)
fit_interrupted(model, callback, interrupt, x=X_INT, epochs=2)
leave(callback)
named = {}
for i, (collection, variable) in enumerate(variables_of(model)):
    named[f"{i}:{collection}"] = to_numpy(variable)
np.savez(arrays, **named)
"""


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """The other backends at work, at the same time."""
    running = {}
    for backend in OTHERS:
        directory = tmp_path_factory.mktemp(backend)
        paths = directory / "backup", directory / "arrays.npz"
        running[backend] = (Child(_SAVE, *paths, backend=backend), *paths)
    yield running
    for child, *_ in running.values():
        child.kill()


@pytest.fixture(scope="module", params=OTHERS)
def saved(request, children):
    """A backup made on another backend, and its variables by collection, in order."""
    child, backup_dir, arrays = children[request.param]
    child.wait()
    collections = {}
    with np.load(arrays) as file:
        for name in sorted(file, key=lambda name: int(name.split(":")[0])):
            collections.setdefault(name.split(":")[1], []).append(file[name])
    return backup_dir, collections


def now(model):
    collections = {}
    for collection, variable in variables_of(model):
        collections.setdefault(collection, []).append(variable)
    return collections


def test_weights_come_over_bit_for_bit(saved):
    backup_dir, expected = saved
    model = rich_model(OPTIMIZER)
    probe = restored(model, backup_dir)
    assert probe.initial_epoch == 1
    found = now(model)
    for collection in ("trainable_variables", "non_trainable_variables"):
        assert len(found[collection]) == len(expected[collection]) > 0
        for variable, array in zip(found[collection], expected[collection], strict=True):
            value = np.array(variable.numpy() if hasattr(variable, "numpy") else variable)
            if array.dtype.kind in "iu":  # seeds: the width is the backend's choice
                assert np.array_equal(value, array), variable.path
            else:
                assert (value.dtype, value.tobytes()) == (array.dtype, array.tobytes())


def test_optimizer_iterations_and_slots_come_over(saved):
    backup_dir, expected = saved
    model = rich_model(OPTIMIZER)
    restored(model, backup_dir)
    assert int(model.optimizer.iterations) == 10
    variables = now(model)["optimizer_variables"]
    assert len(variables) == len(expected["optimizer_variables"]) > 4
    moved = 0
    for variable, array in zip(variables, expected["optimizer_variables"], strict=True):
        value = variable.numpy()
        assert np.array_equal(value, array), variable.path
        if array.dtype.kind == "f":
            assert value.tobytes() == array.tobytes()
            moved += bool(np.any(array))
    assert moved > 4


def test_training_goes_on_and_saves_here(saved, tmp_path):
    backup_dir, _ = saved
    shutil.copytree(backup_dir, tmp_path / "backup")
    model, probe = rich_model(OPTIMIZER), Interrupt()
    callback = stepsave.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    assert fit(model, callback, probe, x=X_INT, epochs=3).epoch == [1, 2]
    assert int(model.optimizer.iterations) == 3 * STEPS
    again = rich_model(OPTIMIZER)
    restored(again, tmp_path / "backup")
    np.testing.assert_equal(again.get_weights(), model.get_weights())
