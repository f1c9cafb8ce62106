"""The same for `keras.Model.fit`: one model, and one callback for each system.

Backups are made as an epoch of three steps ends: Keras's own callbacks go on at the beginning of an
epoch, and after a save within one they would repeat steps with weights that have made them already.
Data come in order: those callbacks do not bring back a shuffle.
"""

import sys
import time

import numpy as np

from proof.chaos_trainings import EVERY, STEPS

sys.modules.setdefault("tensorflow", None)  # JAX trains; to import this would be most of a run

import keras  # noqa: E402

ROWS = 8  # of a batch


def train(name, directory, seed, said):
    keras.utils.set_random_seed(seed % (1 << 32))
    layers = keras.layers
    model = keras.Sequential([layers.Input((16,)), layers.Dense(24, "tanh"), layers.Dense(4)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)  # what is loaded before `fit` needs its slots
    rng = np.random.default_rng(seed)
    x, y = (rng.standard_normal((EVERY * ROWS, size), np.float32) for size in (16, 4))
    system = FITS[name](directory, model)
    told = Told(system, said)
    model.fit(
        x,
        y,
        batch_size=ROWS,
        epochs=STEPS // EVERY,
        initial_epoch=system.initial_epoch,
        shuffle=False,
        verbose=0,
        callbacks=[Awaited(system, said), system.callback, told],
    )
    said.acknowledged(STEPS)  # all of these have waited when `fit` returns
    return model.get_weights()


class Awaited(keras.callbacks.Callback):
    """Before the callback under test: waits for what that has begun after the step before."""

    def __init__(self, system, said):
        super().__init__()
        self._system, self._said = system, said

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
        self._said.acknowledged(self._system.wait())

    def on_epoch_end(self, epoch, logs=None):  # noqa: ARG002
        self._said.acknowledged(self._system.wait())


class Told(keras.callbacks.Callback):
    """After the callback under test: says where it went on, and what it has begun."""

    def __init__(self, system, said):
        super().__init__()
        self._system, self._said = system, said

    def on_train_begin(self, logs=None):  # noqa: ARG002
        self._said.resumed(int(self.model.optimizer.iterations))

    def on_epoch_end(self, epoch, logs=None):  # noqa: ARG002
        self._system.begun = (epoch + 1) * EVERY


class Fit:
    """A callback under test. What it does is done when it returns, unless it says otherwise."""

    initial_epoch = 0
    begun = 0

    def wait(self):
        return self.begun

    def went_on(self, model):
        """Where a training goes on whose weights were loaded before `fit`."""
        self.initial_epoch = int(model.optimizer.iterations) // EVERY


class Stepsave(Fit):
    save_freq, every = "epoch", EVERY

    def __init__(self, directory, _model):
        import stepsave

        self.callback = stepsave.BackupAndRestore(
            directory, self.save_freq, delete_checkpoint=False, save_before_preemption=True
        )

    def wait(self):
        """Of a training from its beginning, the one that the tester kills."""
        while (stats := self.callback.stats()).started > stats.committed + stats.failed:
            time.sleep(0.001)
        return min(stats.committed * self.every, STEPS)


class StepsaveWithin(Stepsave):
    """Two steps between saves and three in an epoch: most saves are within one."""

    save_freq = every = 2


class Keras(Fit):
    double = False

    def __init__(self, directory, _model):
        self.callback = keras.callbacks.BackupAndRestore(
            str(directory), double_checkpoint=self.double, delete_checkpoint=False
        )


class KerasDouble(Keras):
    double = True


class ModelCheckpoint(Fit):
    def __init__(self, directory, model):
        path = directory / "checkpoint.weights.h5"
        if path.exists():
            model.load_weights(path)
            self.went_on(model)
        self.callback = keras.callbacks.ModelCheckpoint(str(path), save_weights_only=True)


class OrbaxCheckpoint(Fit):
    def __init__(self, directory, model):
        self.callback = keras.callbacks.OrbaxCheckpoint(str(directory.resolve()))
        if self.callback.checkpointer.latest is not None:
            model.load_weights(str(directory.resolve()))
            self.went_on(model)

    def wait(self):
        self.callback.wait_until_finished()
        return self.begun


FITS = {
    "fit_stepsave": Stepsave,
    "fit_stepsave_within": StepsaveWithin,
    "fit_keras": Keras,
    "fit_keras_double": KerasDouble,
    "fit_model_checkpoint": ModelCheckpoint,
    "fit_orbax": OrbaxCheckpoint,
}
