"""`stepsave export` to files of Keras, read by stock Keras."""

import contextlib
import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
from cli_support import call, environment, run
from engine_support import change_json, flip_bit, in_own_mounts, save_once

import stepsave

keras = pytest.importorskip("keras")
BACKEND = keras.backend.backend()

CUSTOM = """
import keras

@keras.saving.register_keras_serializable("mine")
class Scale(keras.layers.Layer):
    def build(self, shape):
        self.by = self.add_weight(shape=(shape[-1],), initializer="random_normal", name="by")

    def call(self, x):
        return x * self.by
"""


def make(layer=None, *, compiled=True):
    inputs = keras.Input((6, 4))
    x = keras.layers.LSTM(5)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.2)(x)
    x = x if layer is None else layer(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    if compiled:
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def train(model, backup_dir):
    rng = np.random.default_rng(0)
    x, y = rng.random((16, 6, 4), np.float32), rng.random((16, 2), np.float32)
    callback = stepsave.BackupAndRestore(backup_dir, save_freq=2, delete_checkpoint=False)
    model.fit(x, y, epochs=2, batch_size=4, verbose=0, callbacks=[callback])
    return x


def bits(values):
    return [(array.dtype, array.shape, array.tobytes()) for array in map(as_numpy, values)]


def as_numpy(value):
    return np.asarray(keras.ops.convert_to_numpy(value))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, the directory of its backup, and data. Do not change them."""
    keras.utils.set_random_seed(3)
    backup_dir = tmp_path_factory.mktemp("trained") / "backup"
    model = make()
    x = train(model, backup_dir)
    return model, backup_dir, x


@pytest.fixture
def export(monkeypatch, capsys):
    """Exports in this process, where Keras is there already; returns what was said."""
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards

    def export(backup_dir, out, *options, status=0):
        call("export", backup_dir, out, *options, status=status)
        return capsys.readouterr()

    return export


@pytest.mark.parametrize("compiled", [False, True])
def test_stock_load_weights_gives_a_new_model_the_same_bits(trained, tmp_path, export, compiled):
    model, backup_dir, _ = trained
    assert "--all" in export(backup_dir, tmp_path / "out.weights.h5").out
    keras.utils.set_random_seed(55)
    other = make(compiled=compiled)
    assert bits(other.get_weights()) != bits(model.get_weights())
    # Keras says that the file has nothing for the optimizer.
    skips = pytest.warns(UserWarning, match="Skipping variable loading for optimizer")
    with skips if compiled else contextlib.nullcontext():
        other.load_weights(tmp_path / "out.weights.h5")
    assert bits(other.get_weights()) == bits(model.get_weights())


def test_all_has_the_optimizer_in_the_weights_file_too(trained, tmp_path, export):
    model, backup_dir, _ = trained
    export(backup_dir, tmp_path / "out.weights.h5", "--all")
    other = make()
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "out.weights.h5")
    assert bits(other.get_weights()) == bits(model.get_weights())
    assert bits(other.optimizer.variables) == bits(model.optimizer.variables)


def test_stock_load_model_rebuilds_the_model_with_the_same_bits(trained, tmp_path, export):
    model, backup_dir, x = trained
    export(backup_dir, tmp_path / "out.keras")
    loaded = keras.saving.load_model(tmp_path / "out.keras")
    assert bits(loaded.get_weights()) == bits(model.get_weights())
    assert not loaded.compiled
    np.testing.assert_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_all_has_what_training_needs_to_go_on(trained, tmp_path, export):
    model, backup_dir, _ = trained
    export(backup_dir, tmp_path / "out.keras", "--all")
    loaded = keras.saving.load_model(tmp_path / "out.keras")
    assert bits(loaded.get_weights()) == bits(model.get_weights())
    assert bits(loaded.optimizer.variables) == bits(model.optimizer.variables)
    assert int(loaded.optimizer.iterations) == 8
    assert loaded.loss == "mse"


def test_without_a_word_it_runs_on_the_backend_of_the_backup(trained, tmp_path):
    model, backup_dir, _ = trained
    variables = {name: value for name, value in environment().items() if name != "KERAS_BACKEND"}
    ended = run("export", backup_dir, tmp_path / "out.weights.h5", "--json", only=variables)
    assert f'"backend": "{BACKEND}"' in ended.stdout
    assert ended.stderr == ""
    other = make(compiled=False)
    other.load_weights(tmp_path / "out.weights.h5")
    assert bits(other.get_weights()) == bits(model.get_weights())


@pytest.mark.slow
def test_another_backend_writes_the_same_weights(trained, tmp_path):
    model, backup_dir, _ = trained
    name = "torch" if BACKEND == "jax" else "jax"
    run("export", backup_dir, tmp_path / "out.weights.h5", variables={"KERAS_BACKEND": name})
    other = make(compiled=False)
    other.load_weights(tmp_path / "out.weights.h5")
    assert bits(other.get_weights()) == bits(model.get_weights())


def test_layers_of_ones_own_come_with_the_module_that_registers_them(tmp_path, monkeypatch, export):
    (tmp_path / "my_layers.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    import my_layers

    model = make(my_layers.Scale())
    train(model, tmp_path / "backup")
    out = tmp_path / "out.keras"
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    # As in a process that has not imported it.
    monkeypatch.delitem(sys.modules, "my_layers")
    keras.saving.get_custom_objects().clear()
    told = export(tmp_path / "backup", out, status=2).err
    assert "Keras cannot rebuild the model: " in told
    assert "--import MODULE" in told
    told = export(tmp_path / "backup", out, "--import", "no_module", status=2).err
    assert f"--import no_module: expected a module in {tmp_path} or one" in told
    assert not out.exists()
    export(tmp_path / "backup", out, "--import", "my_layers")
    loaded = keras.saving.load_model(out)
    assert bits(loaded.get_weights()) == bits(model.get_weights())


def test_without_a_config_it_says_what_to_do(tmp_path, export):
    save_once(tmp_path / "backup", {"w": np.ones(3)})
    for name in ("out.weights.h5", "out.keras"):
        told = export(tmp_path / "backup", tmp_path / name, status=2).err
        assert "no config by which Keras could rebuild its model" in told
        assert "load_weights" in told
        assert ".safetensors" in told
    assert os.listdir(tmp_path) == ["backup"]


def test_a_config_that_is_none_is_damage(tmp_path, export):
    train(make(), tmp_path / "backup")
    change_json(tmp_path / "backup", "model_config/_strings.json", lambda _: {"other": 1})
    told = export(tmp_path / "backup", tmp_path / "out.keras", status=1).err
    assert f"{tmp_path}/backup/8/model_config/_strings.json: expected the config of a model" in told
    assert os.listdir(tmp_path) == ["backup"]


def test_without_any_backend_it_says_what_to_install(trained, tmp_path, export, monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    for name in ("jax", "torch", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, None)
    told = export(trained[1], tmp_path / "out.keras", status=2).err
    assert "Keras needs a backend to rebuild the model, and none is installed" in told
    assert f"stepsave[{BACKEND}]" in told
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["out.weights.h5", "out.keras"])
def test_of_a_damaged_backup_keras_writes_nothing(tmp_path, export, name):
    train(make(), tmp_path / "backup")
    flip_bit(tmp_path / "backup/8/pytree/d/c/0", 100)
    assert "CRC-32C" in export(tmp_path / "backup", tmp_path / name, status=1).err
    assert os.listdir(tmp_path) == ["backup"]


def test_a_full_disk_leaves_no_file_of_keras(trained, tmp_path):
    (tmp_path / "small").mkdir()
    mounts = in_own_mounts(f"mount -t tmpfs -o size=16k tmpfs {tmp_path}/small")
    script = f'"$@"; status=$?; ls -A {tmp_path}/small >&2; exit $status'
    prefix = [*mounts, "sh", "-c", script, "sh"]
    out = tmp_path / "small" / "out.weights.h5"
    variables = {"KERAS_BACKEND": BACKEND}
    ended = run("export", trained[1], out, status=2, prefix=prefix, variables=variables)
    assert "cannot write the file" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("stepsave: "), "something is left"
