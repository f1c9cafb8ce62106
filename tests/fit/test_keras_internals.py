# ruff: noqa: ARG002  callbacks have Keras's signatures
"""What stepsave uses of Keras that Keras does not promise: fails when Keras changes it."""

import inspect

import keras
import pytest
from exact_sources import BACKEND, SOURCES
from exact_support import Interrupt, StopError, backup_for, make_model
from keras_support import fit, step_model
from rows import samples

import stepsave
from stepsave.fit import keras_internals
from stepsave.fit.keras_data import EpochData


class Look(keras.callbacks.Callback):
    """Runs something within `fit`, when training begins and at each batch."""

    def __init__(self, begin=None, batch=None):
        super().__init__()
        self.begin, self.batch = begin, batch
        self.found = []

    def on_train_begin(self, logs=None):
        if self.begin:
            self.found.append(self.begin(self._model))

    def on_train_batch_begin(self, batch, logs=None):
        if self.batch and batch:
            self.found.append(self.batch(self._model))


def test_the_running_fit_is_found_with_its_data_and_its_callbacks():
    look = Look(begin=keras_internals.find_fit)
    fit(step_model(), look)
    (found,) = look.found
    assert look in found.callbacks.callbacks
    assert type(found.epoch_iterator).__name__.endswith("EpochIterator")
    assert found.code.co_name == "fit"


def test_outside_of_a_fit_none_is_found():
    assert keras_internals.find_fit(step_model()) is None


def test_the_train_function_is_looked_up_at_every_step():
    calls = []

    def swap(model):
        train = model.train_function

        def counted(*args):
            calls.append(len(args))
            model.train_function = train
            return train(*args)

        model.train_function = counted

    fit(step_model(), Look(batch=swap))
    assert calls == [2 if BACKEND == "jax" else 1] * 6


def test_an_epoch_iterator_has_the_methods_that_are_watched():
    look = Look(begin=keras_internals.find_fit)
    fit(step_model(), look)
    data = EpochData(look.found[0].epoch_iterator)
    assert data.steps == 7
    assert data.steps_per_execution == 1
    assert data.streams_last is False
    assert data.adapter.num_batches == 7
    assert inspect.isgenerator(data.enumerate())
    assert data.get_iterator() is not None
    data.watch(lambda: iter(()), lambda: None)
    assert list(iter(data._iterator)._epoch_iterator) == []
    data.unwatch()
    before = data._iterator._steps_seen
    data.count_as_seen(3)
    assert data._iterator._steps_seen == before + 3


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.first
def test_each_kind_of_data_is_known_by_its_adapter(source, backup_dir):
    backup = backup_for(backup_dir, "exception")
    names = []
    with pytest.raises(StopError):
        make_model().fit(
            **{"shuffle": False} | SOURCES[source](),
            epochs=2,
            verbose=0,
            callbacks=[
                backup,
                Look(begin=lambda _: names.append(backup._loop.source.name)),
                Interrupt("middle", "exception", backup),
            ],
        )
    backup._saver.close()
    (name,) = names
    expected = source.split(",")[0].split(" with")[0].split(" that")[0].split(" in order")[0]
    kinds = {"StatefulDataLoader": "DataLoader", "PyDataset": "keras.utils.PyDataset"}
    kind = kinds.get(expected, expected)
    if kind.startswith("grain"):
        kind = "grain dataset"
    elif kind.startswith("torch"):
        kind = "DataLoader"
    elif kind == "tf.data":
        kind = "tf.data.Dataset"
    assert kind in name
    assert name != stepsave.fit.sources.Source.name


def test_the_state_of_jax_is_where_it_is_read():
    look = Look(batch=keras_internals.jax_state)
    fit(step_model(), look)
    if BACKEND != "jax":
        assert look.found == [None] * 6
        return
    for state in look.found:
        assert set(state) == {
            "trainable_variables",
            "non_trainable_variables",
            "optimizer_variables",
            "metrics_variables",
        }


def test_the_global_seed_generator_can_be_read_and_set():
    keras.random.uniform((2,))
    seed = keras.ops.convert_to_numpy(keras_internals.global_seed().value).copy()
    first = keras.ops.convert_to_numpy(keras.random.uniform((4,)))
    keras_internals.set_global_seed(seed)
    again = keras.ops.convert_to_numpy(keras.random.uniform((4,)))
    assert first.tobytes() == again.tobytes()


def test_epoch_0_can_be_where_a_fit_begins():
    class Begin(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            keras_internals.set_initial_epoch(self._model, 0, owner=self)

    history = fit(step_model(), Begin(), epochs=2, initial_epoch=1)
    assert history.epoch == [0, 1]


@pytest.mark.parametrize("name", sorted(keras_internals._CALLBACK_ATTRIBUTES))
def test_callbacks_of_keras_have_the_attributes_that_are_their_state(name, tmp_path):
    arguments = {
        "ModelCheckpoint": {"filepath": str(tmp_path / "x.keras"), "monitor": "loss"},
        "OrbaxCheckpoint": {"directory": str(tmp_path / "orbax"), "monitor": "loss"},
        "BackupAndRestore": {"backup_dir": str(tmp_path / "backup")},
        "TensorBoard": {"log_dir": str(tmp_path / "logs")},
        "SwapEMAWeights": {},
    }
    if name == "TensorBoard":
        pytest.importorskip("tensorboard")
    callback = getattr(keras.callbacks, name)(**arguments.get(name, {"monitor": "loss"}))
    model = make_model(keras.optimizers.SGD(0.1, use_ema=name == "SwapEMAWeights"))
    x, y = samples()
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
    missing = [a for a in keras_internals.callback_attributes(callback) if not hasattr(callback, a)]
    assert not missing


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere Keras makes them before `fit`")
def test_all_variables_of_the_first_step_can_be_made_before_it():
    model = make_model()
    x, y = samples()
    model.build((None, 5))
    tf = pytest.importorskip("tensorflow")
    spec = tf.data.Dataset.from_tensor_slices((x, y)).batch(4).element_spec
    keras_internals.trace_training(model, spec)
    names = {variable.path.split("/")[0] for variable in model.metrics_variables}
    assert {"loss", "auc"} <= names
