"""Models that Keras builds from the first batch, and training steps of their own."""

import keras
import numpy as np
import pytest
from keras_support import BACKEND, Interrupt, InterruptionError, leave, state_of

import stepsave

X = np.random.default_rng(0).normal(size=(48, 4)).astype("float32")
STEPS = 6


class Unbuilt(keras.Model):
    """As most models are that people subclass: nothing says what it is given."""

    def __init__(self):
        super().__init__(name="unbuilt")
        self.down = keras.layers.Dense(2, name="down")
        self.up = keras.layers.Dense(4, name="up")

    def call(self, x):
        return self.up(self.down(x))


class SelfSupervised(Unbuilt):
    """Has no targets, and unpacks its batches itself."""

    def __init__(self):
        super().__init__()
        self.second = keras.optimizers.Adam(0.01)

    def train_step(self, data):
        import tensorflow as tf

        x = data["rows"] if isinstance(data, dict) else data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x=x, y=x, y_pred=self(x, training=True))
        variables = self.down.trainable_weights
        self.second.apply(tape.gradient(loss, variables), variables)
        variables = self.up.trainable_weights
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}


class MarkedAsBuilt(Unbuilt):
    def __init__(self):
        super().__init__()
        self.built = True  # as `build` of the base class says, whatever the layers are


def train(make, data, *callbacks, **arguments):
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    model = make()
    model.compile("adam", "mse", **arguments)
    logs = keras.callbacks.LambdaCallback(on_epoch_end=lambda _, logs: seen.append(dict(logs)))
    seen = []
    data = data() | {"batch_size": 8} if "y" in data() else data()
    try:
        model.fit(**data, epochs=3, verbose=0, shuffle=False, callbacks=[*callbacks, logs])
    except InterruptionError:
        leave(callbacks[0])
        return None
    return state_of(model), seen


def goes_on_exactly(make, data, backup_dir, **arguments):
    expected, logs = train(make, data, **arguments)
    for interruption in (Interrupt(step=STEPS + 4), Interrupt(epoch_begin=2)):
        backup = stepsave.BackupAndRestore(backup_dir, 3)
        assert train(make, data, backup, interruption, **arguments) is None
    found, again = train(make, data, stepsave.BackupAndRestore(backup_dir, 3), **arguments)
    assert found == expected
    assert again == logs[1:]  # the last save is of the end of the second epoch's batches


def arrays():
    return {"x": X, "y": X}


def rows_alone():
    import tensorflow as tf

    return {"x": tf.data.Dataset.from_tensor_slices(X).batch(8)}


def rows_in_a_dict():
    import tensorflow as tf

    mask = X[:, 0] > 0
    return {"x": tf.data.Dataset.from_tensor_slices({"rows": X, "mask": mask}).batch(8)}


@pytest.mark.parametrize("make", [Unbuilt, MarkedAsBuilt])
def test_a_model_that_fit_builds_goes_on_in_a_new_process(make, backup_dir):
    goes_on_exactly(make, arrays, backup_dir, metrics=["mae"])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its training step is of TensorFlow")
@pytest.mark.parametrize("data", [rows_alone, rows_in_a_dict])
def test_a_self_supervised_model_goes_on_with_all_its_optimizers(data, backup_dir):
    goes_on_exactly(SelfSupervised, data, backup_dir)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its training step is of TensorFlow")
def test_a_training_step_that_runs_eagerly_goes_on_too(backup_dir):
    goes_on_exactly(SelfSupervised, rows_alone, backup_dir, run_eagerly=True)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere Keras builds before training begins")
def test_a_model_whose_training_step_cannot_be_traced_is_refused_with_what_to_do(backup_dir):
    class OnHost(Unbuilt):
        def train_step(self, data):
            data[0].numpy()
            return super().train_step(data)

    backup = stepsave.BackupAndRestore(backup_dir, 3)
    train(OnHost, arrays, backup, Interrupt(step=4), run_eagerly=True)
    refused = stepsave.BackupAndRestore(backup_dir, 3)
    with pytest.raises(stepsave.BackupMismatchError, match="Call it on a batch of data"):
        train(OnHost, arrays, refused, run_eagerly=True)
    leave(refused)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere metrics exist before `fit` begins")
def test_a_built_model_whose_step_cannot_be_traced_goes_on_without_its_metrics_and_says_so(
    backup_dir,
):
    class OnHost(Unbuilt):
        def train_step(self, data):
            data[0].numpy()
            return super().train_step(data)

    def make():
        model = OnHost()
        model(X[:1])
        return model

    arguments = {"run_eagerly": True, "metrics": ["mae"]}
    expected, _ = train(make, arrays, **arguments)
    train(make, arrays, stepsave.BackupAndRestore(backup_dir, 3), Interrupt(step=4), **arguments)
    with pytest.warns(stepsave.ChangedTrainingWarning, match="cannot be traced before it runs"):
        found, _ = train(make, arrays, stepsave.BackupAndRestore(backup_dir, 3), **arguments)
    assert found == expected
