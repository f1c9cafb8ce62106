"""State below a model that is in none of its four collections."""

import keras
import numpy as np
import pytest
from keras_support import BACKEND, Interrupt, InterruptionError, fit, leave

import stepsave
from stepsave.fit.keras_saving import walk

X = np.random.default_rng(3).normal(size=(16, 4)).astype("float32")
Y = X[:, :1]


class Counting(keras.layers.Layer):
    """Keeps counts outside of variables, and saves them by Keras's own methods."""

    def __init__(self):
        super().__init__()
        self.seen = np.zeros(3)
        self.refuses = False

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["seen"] = self.seen

    def load_own_variables(self, store):
        if self.refuses:
            raise ValueError("not these")
        super().load_own_variables({"0": store["0"]})
        self.seen = np.array(store["seen"])
        self.doubled = 2 * np.array(store["0"])  # derived from a variable


class Whole(keras.Model):
    def __init__(self):
        super().__init__(name="whole")
        self.counting, self.dense = Counting(), keras.layers.Dense(1)
        self.second = keras.optimizers.Adam(1e-2)  # as a GAN has
        self.more = {"third": [keras.optimizers.SGD(0.1, momentum=0.9)]}

    def call(self, x):
        return self.dense(self.counting(x))


def make_whole(value, *, build=True):
    keras.utils.clear_session()
    model = Whole()
    model.compile("sgd", "mse", run_eagerly=BACKEND == "tensorflow")
    model(X[:1])
    for optimizer in (model.second, model.more["third"][0]):
        if not build:
            continue
        optimizer.build(model.dense.trainable_variables)
        optimizer.iterations.assign(value)
        optimizer.variables[-1].assign(np.full(optimizer.variables[-1].shape, value, "float32"))
    model.counting.seen = np.full(3, float(value))
    return model


def all_that_keras_saves(model, path):
    """Every array that Keras's own `save_weights` writes, by name."""
    import h5py

    model.save_weights(path)
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]} if hasattr(item, "dtype") else {})
        )
    return found


def assert_comes_back(first, second, backup_dir, tmp_path):
    """Interrupts a training, goes on with a model that begins otherwise, and compares all."""
    saved, restored = tmp_path / "saved.weights.h5", tmp_path / "restored.weights.h5"
    arrays = []
    for model, path in ((first, saved), (second, restored)):
        interrupt = Interrupt(epoch_begin=2)
        callback = stepsave.BackupAndRestore(backup_dir)
        with pytest.raises(RuntimeError, match="interrupted by the test"):
            fit(model, callback, interrupt, x=X, y=Y, epochs=4)
        leave(callback)
        arrays.append(all_that_keras_saves(model, path))
    assert interrupt.epochs == [2]
    expected, found = arrays
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_all_that_keras_saves_comes_back(backup_dir, tmp_path):
    first = make_whole(5)
    second = make_whole(0)
    assert_comes_back(first, second, backup_dir, tmp_path)
    assert second.counting.seen.tolist() == [5, 5, 5]
    scale = keras.ops.convert_to_numpy(second.counting.scale)
    np.testing.assert_array_equal(second.counting.doubled, 2 * scale)
    assert int(second.second.iterations) == int(second.more["third"][0].iterations) == 5


def test_stock_keras_passes_over_what_it_does_not_know(backup_dir):
    first, second = make_whole(5), make_whole(0)
    callback = stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False)
    fit(first, callback, x=X, y=Y)
    second.load_weights(backup_dir)
    for mine, theirs in zip(second.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_an_object_that_refuses_its_state_leaves_the_model_as_it_was(backup_dir):
    callback = stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False)
    fit(make_whole(5), callback, x=X, y=Y)
    model = make_whole(0)
    model.counting.refuses = True
    weights = model.get_weights()
    refused = stepsave.BackupAndRestore(backup_dir)
    with pytest.raises(stepsave.BackupMismatchError, match=r"Counting \(counting\) refuses"):
        fit(model, refused, x=X, y=Y)
    leave(refused)
    np.testing.assert_equal(model.get_weights(), weights)
    assert model.counting.seen.tolist() == [0, 0, 0]
    assert int(model.second.iterations) == 0


def test_slots_of_an_optimizer_that_is_not_built_are_not_dropped_silently(backup_dir):
    fit(make_whole(5), stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False), x=X, y=Y)
    model = make_whole(0, build=False)
    with pytest.warns(UserWarning, match="not built yet") as caught:
        fit(model, stepsave.BackupAndRestore(backup_dir), x=X, y=Y, epochs=2)
    assert sum("not built yet" in str(w.message) for w in caught) == 2
    assert int(model.second.iterations) == 5


@pytest.mark.parametrize("adapted", [False, True], ids=["not adapted again", "on other data"])
def test_the_statistics_of_a_normalization_are_those_of_the_backup(adapted, backup_dir, tmp_path):
    def make(rows):
        norm = keras.layers.Normalization(name="norm")
        if rows is not None:
            norm.adapt(rows)
        inputs = keras.Input((4,))
        model = keras.Model(inputs, keras.layers.Dense(1, name="out")(norm(inputs)), name="m")
        model.compile("sgd", "mse")
        return model

    first, second = make(3 * X + 1), make(5 * X if adapted else None)
    assert_comes_back(first, second, backup_dir, tmp_path)
    for name in ("mean", "variance"):
        mine, theirs = (np.array(getattr(m.get_layer("norm"), name)) for m in (first, second))
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.skipif(BACKEND != "torch", reason="the wrapper exists on torch only")
def test_the_buffers_of_a_torch_module_come_back(backup_dir, tmp_path):
    import torch

    def make():
        inputs = keras.Input((4,))
        norm = keras.layers.TorchModuleWrapper(torch.nn.BatchNorm1d(4), "norm", (None, 4))
        model = keras.Model(inputs, keras.layers.Dense(1, name="out")(norm(inputs)))
        model.compile("sgd", "mse")
        return model

    first, second = make(), make()
    assert_comes_back(first, second, backup_dir, tmp_path)
    module = second.get_layer("norm").module
    assert int(module.num_batches_tracked) > 0
    torch.testing.assert_close(
        module.running_mean, first.get_layer("norm").module.running_mean, rtol=0, atol=0
    )


def test_a_metric_more_or_less_never_refuses_a_backup(backup_dir):
    def make(**kwargs):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="o")])
        model.compile("sgd", "mse", **kwargs)
        return model

    for epoch, metrics in enumerate([[], ["mae"], ["mae", "mape"], ["mape"]], start=1):
        callback = stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False)
        history = fit(make(metrics=metrics), callback, x=X, y=Y, epochs=epoch)
        assert history.epoch == [epoch - 1]


def test_a_new_metric_within_an_epoch_counts_what_is_left_of_it_and_that_is_said(backup_dir):
    def train(callback, *others, metrics=()):
        keras.utils.clear_session()
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="o")])
        model.compile("sgd", "mse", metrics=list(metrics))
        return fit(model, callback, *others, x=X, y=Y).history

    callback = stepsave.BackupAndRestore(backup_dir, 1)
    with pytest.raises(InterruptionError):
        train(callback, Interrupt(step=2))
    leave(callback)
    with pytest.warns(stepsave.ChangedTrainingWarning, match="new metrics count only what is left"):
        history = train(stepsave.BackupAndRestore(backup_dir, 1), metrics=["mae"])
    assert set(history) == {"loss", "mae"}


def nested():
    body = keras.Sequential([keras.layers.Dense(4, name="a")], name="body")
    return keras.Sequential([keras.Input((4,)), body, keras.layers.Dense(1, name="o")], name="m")


def adapted_before():
    norm = keras.layers.Normalization(name="n")
    norm.adapt(X)
    return keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(1, name="o")], name="m")


def adapted_after():
    norm = keras.layers.Normalization(name="n")
    model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(1, name="o")], name="m")
    norm.adapt(X)
    return model


def loaded(model, path):
    model.save(path)
    return keras.saving.load_model(path)


@pytest.mark.parametrize("kind", ["loaded", "adapted"])
def test_a_model_whose_layers_were_built_at_another_time_goes_on(kind, backup_dir, tmp_path):
    if kind == "loaded":
        first, second = nested(), loaded(nested(), tmp_path / "model.keras")
    else:
        first, second = adapted_before(), adapted_after()
    assert {v.path for v in first.variables} != {v.path for v in second.variables}
    for model in (first, second):
        model.compile("adam", "mse")
    assert_comes_back(first, second, backup_dir, tmp_path)


def test_layers_of_other_names_are_refused_all_the_same(backup_dir):
    def make(name):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name=name)])
        model.compile("sgd", "mse")
        return model

    fit(make("o"), stepsave.BackupAndRestore(backup_dir, delete_checkpoint=False), x=X, y=Y)
    refused = stepsave.BackupAndRestore(backup_dir)
    with pytest.raises(stepsave.BackupMismatchError, match="/p/kernel: expected by the model"):
        fit(make("p"), refused, x=X, y=Y)
    leave(refused)


def test_the_walk_finds_what_keras_finds(tmp_path):
    model = make_whole(1)
    mine = {"/".join(path) for path, _ in walk(model)}
    for name in all_that_keras_saves(model, tmp_path / "all.weights.h5"):
        assert name.removeprefix("/").rpartition("/vars")[0] in mine, name
