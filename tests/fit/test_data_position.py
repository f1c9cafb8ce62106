"""Where training goes on when the data is cut into batches otherwise than it was."""
# ruff: noqa: ARG002  callbacks have Keras's signatures

import types

import keras
import numpy as np
import pytest
from keras_support import BACKEND, InterruptionError, leave

import stepsave
from stepsave.fit.data_position import Batching, Stream
from stepsave.fit.keras_data import EpochData

pytestmark = pytest.mark.first

X = np.arange(64 * 3, dtype="float32").reshape(64, 3)
Y = X[:, :1]


@pytest.mark.parametrize(
    ("then", "now", "batches", "place"),
    [
        (Batching(8, 8, 1), Batching(16, 4, 1), 3, 1),  # 24 samples: 16 and 8 again
        (Batching(16, 4, 1), Batching(8, 8, 1), 3, 6),
        (Batching(8, 8, 1), Batching(8, 12, 1), 3, 3),  # data was added
        (Batching(8, 8, 1), Batching(8, 2, 1), 4, 1),  # data was removed: by its share
        (Batching(None, 8, 1), Batching(None, 16, 1), 3, 6),
        (Batching(None, 16, 1), Batching(None, 8, 1), 5, 2),
        (Batching(8, 8, 1), Batching(8, 8, 4), 3, 0),
        (Batching(8, 8, 2), Batching(8, 8, 3), 4, 3),
        (Batching(8, 8, 1), Batching(16, 4, 1), 8, 4),  # nothing was left
        (Batching(8, 8, 1), Batching(16, None, 1), 3, 1),
        (Batching(None, None, 1), Batching(None, 8, 1), 3, 3),
    ],
)
def test_no_sample_is_left_out(then, now, batches, place):
    assert now.place_of(batches, then) == place


def test_what_is_not_known_has_not_changed():
    assert Batching(8, None, 1).changes(Batching(None, 8, 1)) == []
    assert Batching(8, 4, 2).changes(Batching(16, 2, 1)) == [
        "the batch size was 16 and is 8",
        "the number of batches in an epoch was 2 and is 4",
        "`steps_per_execution` was 1 and is 2",
    ]


@pytest.mark.parametrize(
    ("kind", "what"), [(Batching, "Expected a batching"), (Stream, "Expected a stream")]
)
@pytest.mark.parametrize("document", [{"other": 1}, [], None, 3])
def test_documents_that_are_none_are_refused(kind, what, document):
    with pytest.raises(stepsave.CorruptBackupError, match=what):
        kind.from_json(document)


@pytest.mark.parametrize("count", [-1, 1.5, None, True])
def test_a_stream_that_cannot_be_is_refused(count):
    document = Stream().to_json() | {"batches": count}
    with pytest.raises(stepsave.CorruptBackupError, match="Impossible stream in the backup"):
        Stream.from_json(document)


class Seen(keras.callbacks.Callback):
    """Counts batches, and interrupts."""

    def __init__(self, stop=None):
        super().__init__()
        self.stop, self.batches = stop, 0

    def on_train_batch_begin(self, batch, logs=None):
        if self.batches == self.stop:
            raise InterruptionError
        self.batches += 1


def train(backup_dir, batch_size, stop=None, **arguments):
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-6), "mse")
    backup, seen = stepsave.BackupAndRestore(backup_dir, 1), Seen(stop)
    arguments = {"x": X, "y": Y, "batch_size": batch_size, "epochs": 2} | arguments
    try:
        model.fit(**arguments, verbose=0, callbacks=[backup, seen])
    except InterruptionError:
        leave(backup)
    return seen.batches


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("old", "new", "left"), [(8, 16, 3), (16, 8, 2)])
def test_another_batch_size_goes_on_at_the_sample_and_is_said(old, new, left, shuffle, backup_dir):
    train(backup_dir, old, 64 // old + 3, shuffle=shuffle)  # three batches into the second epoch
    told = f"batch size was {old} and is {new}"
    with pytest.warns(stepsave.ChangedTrainingWarning, match=told):
        assert train(backup_dir, new, shuffle=shuffle) == left


def test_another_batch_size_after_the_last_batch_of_an_epoch_leaves_the_next_one_whole(backup_dir):
    train(backup_dir, 8, 8)
    with pytest.warns(stepsave.ChangedTrainingWarning, match="goes on after 4 of the present"):
        assert train(backup_dir, 16) == 4


@pytest.mark.skipif(BACKEND == "torch", reason="Keras <= 3.15 on torch raises for more than 1")
def test_another_number_of_steps_per_execution_leaves_no_batch_out(backup_dir):
    def train(steps_per_execution, stop=None):
        keras.utils.clear_session()
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.0), "mse", steps_per_execution=steps_per_execution)
        backup, seen = stepsave.BackupAndRestore(backup_dir, 1), Seen(stop)
        try:
            model.fit(X, Y, batch_size=8, verbose=0, callbacks=[backup, seen])
        except InterruptionError:
            leave(backup)
        return int(keras.ops.convert_to_numpy(model.optimizer.iterations))

    train(1, 3)
    with pytest.warns(
        stepsave.ChangedTrainingWarning, match="`steps_per_execution` was 1 and is 2"
    ):
        assert train(2) == 3 + 6  # after 2 of 8


def test_data_that_begins_with_a_scalar_has_no_batch_size():
    tf = pytest.importorskip("tensorflow")
    from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter

    data = tf.data.Dataset.from_tensors({"a": 1.0, "rows": X}).repeat(3)
    adapter = TFDatasetAdapter(data)
    assert EpochData(types.SimpleNamespace(data_adapter=adapter)).batch_size is None
    adapter = TFDatasetAdapter(tf.data.Dataset.from_tensor_slices(X).batch(8, drop_remainder=True))
    assert EpochData(types.SimpleNamespace(data_adapter=adapter)).batch_size == 8
