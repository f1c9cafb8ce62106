"""How data is brought to its place, and what is said of data that does not come again."""
# ruff: noqa: ARG002  callbacks have Keras's signatures

import gc
import random
import warnings
import weakref

import keras
import numpy as np
import pytest
from exact_sources import BACKEND, SOURCES, NoisyRows, Rows, ShuffledRows, arrays, torch_loader
from exact_support import Interrupt, StopError, make_model, train
from keras_support import Child
from rows import BATCH, SAMPLES, STEPS, Noise, TorchRows, samples

import stepsave
from stepsave.fit.keras_data import reads_ahead

pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data")


def resumed(tmp_path, source):
    """Interrupts a training after step 12, batch 5 of epoch 1, and resumes it to its end."""
    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        train(source, backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    train(source, stepsave.BackupAndRestore(tmp_path, 3))


def loads_of(monkeypatch, cls, tmp_path, source):
    """Which indices the resumed training loads."""
    loaded = []
    original = cls.__getitem__

    def load(self, index):
        loaded.append(index)
        return original(self, index)

    resumed_loads = []
    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        train(source, backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    monkeypatch.setattr(cls, "__getitem__", load)

    class Begin(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if not resumed_loads:
                resumed_loads.append(len(loaded))

    del loaded[:]
    train(source, stepsave.BackupAndRestore(tmp_path, 3), more=[Begin()])
    return resumed_loads[0], loaded


@pytest.mark.skipif(BACKEND == "tensorflow", reason="there tf.data reads ahead as it likes")
def test_batches_of_a_py_dataset_are_passed_over_without_loading_them(monkeypatch, tmp_path):
    before_first, _ = loads_of(monkeypatch, Rows, tmp_path, "PyDataset")
    # One to learn what a batch looks like, one that stands in for those passed over, and on
    # torch the first that is trained, which is read before callbacks are told.
    assert before_first <= 3 + reads_ahead()


@pytest.mark.skipif(BACKEND == "tensorflow", reason="there tf.data reads ahead as it likes")
def test_batches_of_a_torch_loader_are_passed_over_without_loading_them(monkeypatch, tmp_path):
    before_first, _ = loads_of(monkeypatch, TorchRows, tmp_path, "torch DataLoader")
    assert before_first <= (3 + reads_ahead()) * BATCH


SEEK = ["grain MapDataset"]
if BACKEND != "tensorflow":
    SEEK += ["grain IterDataset", "grain DataLoader"]
if not reads_ahead():
    SEEK += ["StatefulDataLoader"]


@pytest.mark.parametrize("source", SEEK)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_data_that_can_seek_is_not_read_to_be_passed_over(source, tmp_path):
    to_read = []

    class Begin(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            to_read.append((batch, again._loop._to_read))

    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        train(source, backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    again = stepsave.BackupAndRestore(tmp_path, 3)
    train(source, again, more=[Begin()])
    assert to_read[0] == (5, 0)


def noisy_generator():
    x, y = samples()
    while True:
        for i in range(STEPS):
            rows = slice(i * BATCH, (i + 1) * BATCH)
            yield NOISE(x[rows]), y[rows]


NOISE = Noise(np.random)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is read in the background")
def test_what_alone_draws_in_the_background_from_a_global_generator_is_exact_and_doubted(tmp_path):
    def run(*callbacks):
        keras.utils.set_random_seed(4)
        model = make_model()
        data = {"x": noisy_generator(), "steps_per_epoch": STEPS, "shuffle": False}
        model.fit(**data, epochs=2, verbose=0, callbacks=list(callbacks))
        return [keras.ops.convert_to_numpy(variable).tobytes() for variable in model.variables]

    expected = run()
    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        run(backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    told = "only if nothing else draws from that"
    with pytest.warns(stepsave.UnreproducibleDataWarning, match=told):
        assert run(stepsave.BackupAndRestore(tmp_path, 3)) == expected


def reseeded(make, tmp_path):
    """Trains until it is interrupted, and on with another seed."""

    def run(seed, *callbacks):
        keras.utils.set_random_seed(seed)
        make_model().fit(**make(), epochs=2, verbose=0, callbacks=list(callbacks))

    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        run(1, backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    run(2, stepsave.BackupAndRestore(tmp_path, 3))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere the order is restored")
def test_another_seed_for_shuffled_arrays_is_doubted(tmp_path):
    with pytest.warns(stepsave.UnreproducibleDataWarning, match="which was 1 and is 2"):
        reseeded(lambda: arrays(shuffle=True), tmp_path)


def test_another_seed_for_shuffled_tf_data_is_doubted(tmp_path):
    with pytest.warns(stepsave.UnreproducibleDataWarning, match="shuffled by other seeds"):
        reseeded(lambda: {"x": SOURCES["tf.data"]()["x"], "shuffle": False}, tmp_path)


_TWO_DEVICES = """
import sys
from pathlib import Path
from exact_support import *

keras.distribution.set_distribution(keras.distribution.DataParallel())
sources = ("arrays", "torch DataLoader", "grain MapDataset", "grain DataLoader")
for number, source in enumerate(sources):
    expected = train(source)
    directory = Path(sys.argv[1]) / str(number)
    backup = stepsave.BackupAndRestore(directory, 3)
    try:
        train(source, backup, Interrupt("middle", "exception", backup))
        raise AssertionError("it was not interrupted")
    except StopError:
        backup._saver.close()
    found = train(source, stepsave.BackupAndRestore(directory, 3))
    assert not found.differences(expected), (source, found.differences(expected)[:3])
print("all equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="Keras distributes over devices with JAX here")
def test_data_that_is_distributed_over_devices_is_gone_on_with_exactly(tmp_path):
    flags = "--xla_force_host_platform_device_count=2"
    out, _ = Child(_TWO_DEVICES, tmp_path, XLA_FLAGS=flags).wait()
    assert "all equal" in out


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere a framework slices")
def test_arrays_are_not_sliced_for_batches_that_are_passed_over(monkeypatch, tmp_path):
    from keras.src.trainers.data_adapters import array_slicing

    sliced = []
    original = array_slicing.NumpySliceable.__getitem__

    def slice_array(self, indices):
        sliced.append(indices)
        return original(self, indices)

    monkeypatch.setattr(array_slicing.NumpySliceable, "__getitem__", slice_array)
    train("arrays")
    whole = len(sliced)
    del sliced[:]
    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        train("arrays", backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    del sliced[:]
    train("arrays", stepsave.BackupAndRestore(tmp_path, 3))
    # Of x and y, seven batches of epoch 0 and three of its validation, and five of epoch 1.
    assert whole - len(sliced) == 2 * (STEPS + 3 + 5)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it keeps what makes a `tf.data` generator")
def test_the_data_is_freed_when_fit_was_interrupted(tmp_path):
    def run():
        data, backup = Rows(), stepsave.BackupAndRestore(tmp_path, 3)
        interrupt = Interrupt("middle", "exception", backup)
        try:
            make_model().fit(
                data, epochs=2, verbose=0, shuffle=False, callbacks=[backup, interrupt]
            )
        except StopError:
            return weakref.ref(data), backup
        raise AssertionError

    freed, backup = run()
    gc.collect()
    assert freed() is None
    backup._saver.close()


# Data that does not come again.


class OwnOrder(Rows):
    """Shuffles itself and does not say how."""

    def on_epoch_end(self):
        random.shuffle(self.loaded)


def unseeded_generator():
    rng = np.random.default_rng()
    x, y = samples()
    while True:
        rows = rng.permutation(SAMPLES)[:BATCH]
        yield x[rows], y[rows]


def unseeded_tf_dataset():
    import tensorflow as tf

    # With both seeds 0 TensorFlow takes some from the operating system.
    return tf.data.Dataset.from_tensor_slices(samples()).shuffle(SAMPLES).batch(BATCH)


def unordered_tf_dataset():
    import tensorflow as tf

    options = tf.data.Options()
    options.deterministic = False
    dataset = tf.data.Dataset.from_tensor_slices(samples()).shuffle(SAMPLES, seed=3).batch(BATCH)
    return dataset.with_options(options)


DOUBTFUL = {
    "`PyDataset` that changes itself, without `get_state`": (
        lambda: {"x": OwnOrder()},
        "changes itself in `on_epoch_end`",
    ),
    "`PyDataset` with workers and `steps_per_epoch`": (
        lambda: {"x": Rows(workers=2), "steps_per_epoch": STEPS},
        "hands batches that workers had loaded",
    ),
    "`PyDataset` with workers that draw from a generator of its own": (
        lambda: {"x": NoisyRows(np.random.default_rng(8), workers=2)},
        "its workers draw in any order",
    ),
    "generator that draws from an unseeded NumPy generator": (
        lambda: {"x": unseeded_generator(), "steps_per_epoch": STEPS},
        "draws from `rng`",
    ),
    "`tf.data` shuffled without a seed": (
        lambda: {"x": unseeded_tf_dataset()},
        "shuffled without a seed",
    ),
    "`tf.data` with `deterministic=False`": (
        lambda: {"x": unordered_tf_dataset()},
        "`deterministic` is False",
    ),
}
if BACKEND == "tensorflow":
    DOUBTFUL["shuffled arrays on TensorFlow, no global seed"] = (
        lambda: arrays(shuffle=True),
        "none is set",
    )
if BACKEND == "torch":
    DOUBTFUL["`DataLoader` with `persistent_workers`"] = (
        lambda: {"x": torch_loader(num_workers=1, persistent_workers=True)},
        "live on from epoch to epoch",
    )


@pytest.fixture
def _unseeded():
    """TensorFlow without a global seed, as when a process begins."""
    import tensorflow as tf

    tf.random.set_seed(None)
    yield
    tf.random.set_seed(7)


@pytest.mark.first
@pytest.mark.usefixtures("_unseeded")
@pytest.mark.parametrize("name", DOUBTFUL)
def test_position_only(name, tmp_path, record_property):
    """It is warned of once, when training begins, and goes on at the right batch."""
    make, text = DOUBTFUL[name]

    def fit(*callbacks):
        model = make_model()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(**{"shuffle": False} | make(), epochs=2, verbose=0, callbacks=callbacks)
        return model, [w for w in caught if w.category is stepsave.UnreproducibleDataWarning]

    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with (
        pytest.warns(stepsave.UnreproducibleDataWarning, match=text) as told,
        pytest.raises(StopError),
    ):
        make_model().fit(
            **{"shuffle": False} | make(),
            epochs=2,
            verbose=0,
            callbacks=[backup, Interrupt("middle", "exception", backup)],
        )
    backup._saver.close()
    (told,) = [w for w in told if w.category is stepsave.UnreproducibleDataWarning]
    record_property("reason", str(told.message))
    model, again = fit(stepsave.BackupAndRestore(tmp_path, 3))
    assert len(again) == 1
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 2 * STEPS


def test_a_generator_that_begins_otherwise_is_noticed_when_it_is_resumed(tmp_path):
    def fit(first, *callbacks):
        def batches():
            x, y = samples()
            x[:, 1] = first
            while True:
                yield x[:BATCH], y[:BATCH]

        make_model().fit(
            batches(),
            steps_per_epoch=STEPS,
            epochs=2,
            verbose=0,
            shuffle=False,
            callbacks=callbacks,
        )

    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        fit(0.0, backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    with pytest.warns(stepsave.UnreproducibleDataWarning, match="are not those that it began with"):
        fit(1.0, stepsave.BackupAndRestore(tmp_path, 3))


@pytest.mark.skipif(reads_ahead(), reason="there it is read, as Keras reads ahead")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_loader_whose_place_cannot_be_saved_is_read_again(monkeypatch, tmp_path, caplog):
    class Odd:
        """State of a data set that is no data."""

    monkeypatch.setattr(TorchRows, "state_dict", lambda _: {"odd": Odd()}, raising=False)
    monkeypatch.setattr(TorchRows, "load_state_dict", lambda *_: None, raising=False)
    expected = train("StatefulDataLoader")
    backup = stepsave.BackupAndRestore(tmp_path, 3)
    with pytest.raises(StopError):
        train("StatefulDataLoader", backup, Interrupt("middle", "exception", backup))
    backup._saver.close()
    found = train("StatefulDataLoader", stepsave.BackupAndRestore(tmp_path, 3))
    assert not found.differences(expected)
    assert sum("cannot be set to its place" in r.getMessage() for r in caplog.records) == 2


def test_a_py_dataset_that_says_its_state_is_not_warned_of(tmp_path):
    make_model().fit(ShuffledRows(), verbose=0, callbacks=[stepsave.BackupAndRestore(tmp_path)])


def test_long_ways_through_the_data_are_told_of(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("stepsave.fit.passing_over._TOLD_EVERY_S", 0.0)
    with caplog.at_level("INFO", "stepsave"):
        resumed(tmp_path, "generator")
    told = [r.getMessage() for r in caplog.records if "Passing over" in r.getMessage()]
    assert told[0].startswith("Passing over 12 batches")


assert SOURCES
