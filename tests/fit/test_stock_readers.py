"""Backups are read by stock Keras, Orbax and tensorstore, without stepsave."""

import json
import shutil

import keras
import numpy as np
import pytest
from keras_support import (
    BACKEND,
    X_INT,
    Child,
    assert_same_state,
    fit,
    restored,
    rich_model,
    state_of,
    to_numpy,
    variables_of,
)

import stepsave

ocp = pytest.importorskip("orbax.checkpoint")
ts = pytest.importorskip("tensorstore")

# Orbax 0.12 and JAX 0.10 for each other: how PyTreeCheckpointer is to be called, and that
# arrays saved without a JAX sharding are restored by it.
pytestmark = [
    pytest.mark.first,
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:orbax"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:orbax"),
]


def adam():
    return keras.optimizers.Adam(0.01, name="adam")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, and the backup directory with its final state. Do not change either."""
    keras.utils.set_random_seed(1)
    backup_dir = tmp_path_factory.mktemp("stock") / "backup"
    model = rich_model(adam(), names=True)
    fit(model, stepsave.BackupAndRestore(backup_dir, 7, delete_checkpoint=False), x=X_INT)
    return model, backup_dir


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), np.asarray(value)


def expected_leaves(model):
    return {
        f"{collection}.{variable.path.replace('/', '.')}": to_numpy(variable)
        for collection, variable in variables_of(model)
    }


def assert_same_leaves(found, model):
    found, expected = dict(found), expected_leaves(model)
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def bits(weights):
    return [(weight.dtype, weight.shape, weight.tobytes()) for weight in weights]


def test_stock_keras_loads_the_weights(trained):
    model, backup_dir = trained
    keras.utils.set_random_seed(55)
    other = rich_model(adam(), names=True)
    assert bits(other.get_weights()) != bits(model.get_weights())
    other.load_weights(backup_dir)
    assert bits(other.get_weights()) == bits(model.get_weights())


def test_stock_keras_rebuilds_the_whole_model(trained):
    # Stock Keras matches names, and numbers random generators anew in this process.
    model, backup_dir = trained
    loaded = keras.saving.load_model(backup_dir)
    found, expected = (
        [entry for entry in state_of(model) if "seed_generator" not in entry[1]]
        for model in (loaded, model)
    )
    assert_same_state(found, expected, metrics=False)
    assert int(loaded.optimizer.iterations) == 7
    np.testing.assert_equal(loaded.predict(X_INT, verbose=0), model.predict(X_INT, verbose=0))


def test_stock_keras_reads_past_the_arrays_of_callbacks_and_generators(backup_dir):
    keras.utils.set_random_seed(1)
    keras.random.uniform((2,))  # so that there is a global seed
    model = rich_model(adam(), names=True)
    best = keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)
    backup = stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False)
    fit(model, best, backup, x=X_INT)
    with stepsave.Checkpointer(backup_dir) as saver:
        state = saver.restore().state["metrics_variables"]["stepsave"]
    assert len(state["callbacks"]) == len(model.get_weights())
    assert state["rng"]["keras"].shape == (2,)
    other = rich_model(adam(), names=True)
    other.load_weights(backup_dir)
    assert bits(other.get_weights()) == bits(model.get_weights())
    loaded = keras.saving.load_model(backup_dir)
    np.testing.assert_equal(loaded.predict(X_INT, verbose=0), model.predict(X_INT, verbose=0))


def sequential_model():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Reshape((6, 1)),
            keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True)),
            keras.layers.TimeDistributed(keras.layers.Dense(2)),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )


def late_built_model():
    return keras.Sequential([keras.layers.Dense(4), keras.layers.BatchNormalization()])


def functional_model_around_a_sequential_one():
    inputs = keras.Input((6,))
    inner = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)], name="inner")
    return keras.Model(inputs, keras.layers.Dense(1)(inner(inputs)))


@pytest.mark.parametrize(
    "make", [sequential_model, late_built_model, functional_model_around_a_sequential_one]
)
def test_stock_keras_rebuilds_models_that_hold_layers_in_layers(make, backup_dir):
    """Of its own checkpoints of such models it loads no values, and says nothing."""
    model = make()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    callback = stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False)
    model.fit(x, x[:, :1], epochs=1, batch_size=4, verbose=0, callbacks=[callback])
    loaded = keras.saving.load_model(backup_dir)
    assert bits(loaded.get_weights()) == bits(model.get_weights())
    assert bits([v.numpy() for v in loaded.optimizer.variables]) == bits(
        [v.numpy() for v in model.optimizer.variables]
    )


def test_a_model_that_keras_would_rebuild_without_its_values_is_not_offered_to_it(backup_dir):
    model = keras.Sequential([keras.Sequential([keras.layers.Dense(4)]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((4, 6), "float32")
    callback = stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False)
    model.fit(x, x[:, :1], verbose=0, callbacks=[callback])
    with pytest.raises(ValueError, match="does not contain model configuration"):
        keras.saving.load_model(backup_dir)
    weights = bits(model.get_weights())
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    model.load_weights(backup_dir)
    assert bits(model.get_weights()) == weights


def test_orbax_v0_reads_it(trained):
    model, backup_dir = trained
    found = ocp.PyTreeCheckpointer().restore(f"{backup_dir}/7/pytree")
    assert_same_leaves(leaves(found), model)


def test_orbax_v1_reads_it(trained):
    from orbax.checkpoint import v1

    model, backup_dir = trained
    found = v1.load_checkpointables(f"{backup_dir}/7")
    assert_same_leaves(leaves(found["pytree"]), model)
    assert json.loads(found["model_config"]["config"])["class_name"] == "Functional"


def test_plain_tensorstore_reads_every_variable_by_name(trained):
    model, backup_dir = trained
    for name, array in expected_leaves(model).items():
        database = {"driver": "ocdbt", "base": f"file://{backup_dir}/7/pytree/"}
        spec = {"driver": "zarr3", "kvstore": database | {"path": f"{name}/"}}
        found = ts.open(spec, open=True).result().read().result()
        assert found.dtype == array.dtype, name
        assert found.tobytes() == array.tobytes(), name


def flip_bit(backup_dir, leaf):
    layout = json.loads((backup_dir / "7" / "layout.json").read_text())
    (chosen,) = [entry for entry in layout["leaves"] if ".".join(entry["path"]) == leaf]
    number, offset = divmod(chosen["offsets"][0], layout["shard_bytes"])
    with (backup_dir / "7" / "pytree" / "d" / "c" / str(number)).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


# A read that fails leaves Orbax's other reads to end after its event loop was closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_flipped_bit_in_any_variable_is_refused_by_stock_orbax(trained, tmp_path):
    model, backup_dir = trained
    copy = tmp_path / "copy"
    shutil.copytree(backup_dir, copy)
    for name in expected_leaves(model):
        flip_bit(copy, name)
        with pytest.raises(Exception, match=r"(?i)digest mismatch|crc"):
            ocp.PyTreeCheckpointer().restore(f"{copy}/7/pytree")
        flip_bit(copy, name)  # back
    assert_same_leaves(leaves(ocp.PyTreeCheckpointer().restore(f"{copy}/7/pytree")), model)


def test_one_flipped_bit_in_any_variable_is_refused_by_stepsave(trained, tmp_path):
    model, backup_dir = trained
    copy = tmp_path / "copy"
    shutil.copytree(backup_dir, copy)
    other = rich_model(adam(), names=True)
    before = other.get_weights()
    keras.utils.set_random_seed(1)  # the one of `trained`, which orders arrays on TensorFlow
    for name in expected_leaves(model):
        flip_bit(copy, name)
        with pytest.raises(stepsave.CorruptBackupError, match="CRC-32C"):
            restored(other, copy)
        flip_bit(copy, name)
    np.testing.assert_equal(other.get_weights(), before)
    assert_same_state(restored(other, copy).state, state_of(model))


_FOUR_DEVICES = """
import sys
import jax
from keras_support import *
assert len(jax.devices()) == 4
backup_dir = sys.argv[1]
keras.distribution.set_distribution(keras.distribution.DataParallel())

def make():
    inputs = keras.Input((3,))
    x = keras.layers.Dense(8, name="first")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, name="last")(x), name="split")
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9, name="sgd"), "mse")
    return model

model = make()
interrupt = Interrupt(step=4)
callback = stepsave.BackupAndRestore(backup_dir, 4, delete_checkpoint=False)
fit_interrupted(model, callback, interrupt)
leave(callback)
assert len(model.layers[1].kernel.value.sharding.device_set) == 4

keras.utils.set_random_seed(5)
again = make()
assert_same_state(restored(again, backup_dir).state, interrupt.state)
assert len(again.layers[1].kernel.value.sharding.device_set) == 4

for load in (lambda m: m.load_weights(backup_dir), lambda m: keras.saving.load_model(backup_dir)):
    other = make()
    other = load(other) or other
    for a, b in zip(other.get_weights(), again.get_weights(), strict=True):
        assert a.tobytes() == b.tobytes()

# The same backup with the kernels split over the devices, saved and restored again.
mesh = keras.distribution.DeviceMesh((1, 4), ("batch", "model"), jax.devices())
layout = keras.distribution.LayoutMap(mesh)
layout["first/kernel"] = (None, "model")
layout["last/kernel"] = ("model", None)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
split = make()
assert_same_state(restored(split, backup_dir).state, interrupt.state)
assert not split.layers[1].kernel.value.sharding.is_fully_replicated
interrupt = Interrupt(step=6)
callback = stepsave.BackupAndRestore(backup_dir, 10, delete_checkpoint=False)
fit_interrupted(split, callback, interrupt, epochs=2)
leave(callback)
again = make()
assert_same_state(restored(again, backup_dir).state, interrupt.state)
assert '"format":2' in open(f"{backup_dir}/10/layout.json").read(), "in blocks"
for distribution in (keras.distribution.distribution(), keras.distribution.DataParallel()):
    keras.distribution.set_distribution(distribution)
    for load in (
        lambda m: m.load_weights(backup_dir), lambda m: keras.saving.load_model(backup_dir)
    ):
        other = make()
        other = load(other) or other
        for a, b in zip(other.get_weights(), again.get_weights(), strict=True):
            assert a.tobytes() == b.tobytes()
print("all equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="Keras distributes over devices with JAX here")
def test_a_model_on_four_devices_is_saved_and_read(backup_dir):
    flags = "--xla_force_host_platform_device_count=4"
    out, _ = Child(_FOUR_DEVICES, backup_dir, XLA_FLAGS=flags).wait()
    assert "all equal" in out


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it is imported there")
def test_a_training_with_backups_does_not_import_tensorflow_for_them(backup_dir):
    code = """
import sys
from keras_support import *
fit(step_model(), stepsave.BackupAndRestore(sys.argv[1], 2, delete_checkpoint=False))
assert "tensorflow" not in sys.modules
import tensorflow
from keras.src.utils import module_utils
assert module_utils.tensorflow.available
"""
    Child(code, backup_dir).wait()
    with stepsave.Checkpointer(backup_dir) as saver:
        assert saver.restore() is not None
    assert list(backup_dir.glob("*/model_config*")), "it can be rebuilt all the same"
